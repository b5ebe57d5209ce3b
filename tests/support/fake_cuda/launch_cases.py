"""Run in a process whose libcuda is the stand-in: every case goes through the real cuda.core. Prints problems."""

import sys
from pathlib import Path

import torch

from outrider.kernels.kernel_cases import kernel_cases
from outrider.kernels.launch_plans import LaunchPlan
from outrider.kernels.launcher import Launcher

STREAM = 0x77


def main(cache: Path) -> None:
    torch.set_num_threads(1)
    launcher = Launcher(0, "sm_90a", lambda: STREAM, cache)
    num_cases = 0
    for prepare in kernel_cases():
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
