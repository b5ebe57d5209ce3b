"""Run in a process whose libcuda is the stand-in: every case goes through the real cuda.core. Prints problems."""

import sys
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from outrider.kernels.kernel_cases import kernel_cases
from outrider.kernels.launch_plans import LaunchPlan
from outrider.kernels.launcher import Launcher

STREAMS = (0, 0x77)  # torch's default stream has handle 0


def main(cache: Path) -> None:
    torch.set_num_threads(1)
    num_cases = 0
    launchers = [Launcher(0, "sm_90a", partial(int, stream), cache) for stream in STREAMS]
    for launcher, prepare in zip(cycle(launchers), kernel_cases(), strict=False):
        case = prepare(torch.device("cpu"))
        launcher.launch(case.plans)
        for problem in case.verify():
            print(problem)
        num_cases += 1
    too_much = LaunchPlan("gather_rows", "gather_rows_2", (1, 1, 1), 32, 1 << 20, ())
    try:
        launcher.launch([too_much])
        print("a megabyte of shared memory was not refused")
    except RuntimeError as error:
        if "refused" not in str(error):
            print(error)
    print(f"{num_cases} cases launched")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
