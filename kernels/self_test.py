"""The kernels' self-test, in a process of its own: a launch that goes wrong may spoil every later call of the process
that made it, and that must not be the one which wants to load a model.

`python -m outrider.kernels.self_test DEVICE KERNEL...` tests kernels one after the other and says on stdout, in a
line of JSON each, what is wrong with them. It ends after the first launch that fails; `self_test` goes on with the
others in the next process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from outrider.kernels.kernel_cases import Preparation, kernel_cases
from outrider.kernels.launch_plans import LaunchPlan

ENTRIES = (
    "tree_attention",
    "tree_attention_fp8",
    "rope_append",
    "rope_append_fp8",
    "kv_commit",
    "sample_shard",
    "gather_rows",
    "add_rms_norm",
    "silu_mul",
    "round_rows",
    "narrow_matmul",
    "int4_matmul",
    "grow_trees",
)
READY = {"ready": True}  # said once the GPU and the kernels' compiler are there
LIMIT_S = (
    300.0  # of one process: it compiles, and runs for seconds; a kernel that hangs must not hold up loading
)

Launch = Callable[[Sequence[LaunchPlan]], None]
Problems = dict[str, list[str]]


def self_test(
    device_index: int, names: Sequence[str], command: Sequence[str] = (), limit_s: float = LIMIT_S
) -> Problems:
    """What is wrong with each of these kernels on a GPU, by entry name; empty lists where all is well.

    Args:
        device_index: CUDA ordinal.
        names: of `ENTRIES`.
        command: what to run instead of this module, with the same arguments.
        limit_s: seconds for one process.
    """
    command = command or (sys.executable, "-P", "-m", "outrider.kernels.self_test")
    problems: Problems = {}
    while remaining := [name for name in names if name not in problems]:
        output, ending = _output_of([*command, str(device_index), *remaining], limit_s)
        said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        answers = {line["kernel"]: line["problems"] for line in said if "kernel" in line}
        problems |= answers
        silent = [name for name in remaining if name not in answers]
        if READY not in said:
            problems |= {name: [f"the self-test could not begin: {ending}"] for name in silent}
        elif not any(answers.values()) and silent:
            problems[silent[0]] = [f"the self-test ended in it: {ending}"]
    return problems


def _output_of(command: Sequence[str], limit_s: float) -> tuple[str, str]:
    """What a command wrote to stdout, and how it ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            output, errors = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            return output, f"no end after {limit_s:g} s"
    last = errors.strip().splitlines()[-1:] or ["no message"]
    return output, f"exit code {child.returncode}, {last[0]}"


def run_cases(
    launch: Launch,
    device: torch.device,
    cases_of: Mapping[str, Sequence[Preparation]],
    say: Callable[[Mapping[str, object]], None],
) -> bool:
    """Runs the cases of each kernel and says what is wrong with it. False, at once, when something was raised."""
    for name, cases in cases_of.items():
        problems: list[str] = []
        for prepare in cases:
            what = name
            try:
                case = prepare(device)
                what = case.name
                launch(case.plans)
                problems += case.verify()
            except Exception as error:  # of torch, the driver or NVRTC, which have no class in common
                problems.append(f"{what}: {type(error).__name__}: {error}")
                say({"kernel": name, "problems": problems})
                return False
        say({"kernel": name, "problems": problems})
    return True


def cases_by_kernel(names: Sequence[str]) -> dict[str, list[Preparation]]:
    """The cases of these kernels."""
    cases = kernel_cases()
    kernel_of = [case(torch.device("cpu")).kernel for case in cases]
    return {
        name: [case for case, kernel in zip(cases, kernel_of, strict=True) if kernel == name]
        for name in names
    }


def main(arguments: Sequence[str]) -> int:
    from outrider.kernels.launcher import launcher_of  # needs cuda-core

    device = torch.device("cuda", int(arguments[0]))
    torch.cuda.set_device(device)
    launch = launcher_of(device).launch
    torch.zeros(1, device=device)

    def say(line: Mapping[str, object]) -> None:
        print(json.dumps(line), flush=True)

    say(READY)
    return 0 if run_cases(launch, device, cases_by_kernel(arguments[1:]), say) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
