"""Parts 1 to 3: what is there, whether the kernels compile and pass, and what NVIDIA's sanitizer says of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from outrider.kernels.gpu_check import check_case
from outrider.kernels.roofline import roofline_of
from outrider.kernels.self_test import ENTRIES, self_test
from outrider.workers.first_gpu.report import Row, not_run, passed_or_failed
from outrider.workers.first_gpu.setting import Setting

NO_GPU = "there is no GPU"
TOOL_LIMIT_S = 280.0
# cuda-bindings asks the driver for functions that it may not have; memcheck would count each as an error.
_QUIET = ("--report-api-errors", "no")
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute")


def machine(setting: Setting) -> list[Row]:
    """Versions; NVRTC for this GPU, every kernel; the self-test as a model's loading runs it."""
    from outrider.kernels.compiler import SOURCES, compile_sources, load_sources, target_of
    from outrider.workers.doctor import environment  # needs psutil

    rows = [Row(fact.name, fact.value) for fact in environment()]
    target = target_of(torch.cuda.get_device_capability(setting.device)) if setting.on_gpu else "sm_90a"
    for stem in SOURCES:
        begun = time.monotonic()
        binary = compile_sources(stem, load_sources(stem), target)
        spilled = re.findall(r"[1-9]\d* bytes spill", binary.log)
        said = f"{len(binary.cubin)} bytes in {time.monotonic() - begun:.1f} s"
        rows.append(passed_or_failed(f"compile {stem} for {target}", spilled, said))
    if not setting.on_gpu:
        return [*rows, not_run("self-test", NO_GPU)]
    index = setting.device.index or 0
    problems = self_test(index, ENTRIES)
    return rows + [passed_or_failed(f"self-test {name}", found, "passed") for name, found in problems.items()]


def kernels(setting: Setting) -> list[Row]:
    """Every kernel case against float64, for equal bits, from a graph, timed beside its roofline."""
    if not setting.has_kernels:
        return [not_run("kernel cases", NO_GPU)]
    gpu = setting.open_gpu(setting.device)
    roofline = roofline_of(gpu.name)
    rows = []
    for prepare in setting.cases:
        case = check_case(gpu, prepare, roofline, setting.sizes.repeats)
        said = f"{case.time_s * 1e6:.2f} us, {case.num_repeats} times the same bits"
        least = f"at least {case.least_time_s * 1e6:.2f} us" if case.least_time_s else ""
        row = passed_or_failed(case.name, case.problems, said, least)
        rows.append(Row(row.what, row.measured, row.verdict, least, (("time_us", case.time_s * 1e6),)))
    return rows


def sanitizer(setting: Setting) -> list[Row]:
    """compute-sanitizer over the self-test: memcheck on all kernels, racecheck on attention and its merge."""
    tool = find_tool("compute-sanitizer")
    if not tool:
        return [not_run("memcheck, racecheck", "compute-sanitizer is not on the PATH")]
    index = str(setting.device.index or 0)
    rows = []
    for check, names in (("memcheck", ENTRIES), ("racecheck", ("tree_attention",))):
        test = (sys.executable, "-P", "-m", "outrider.kernels.self_test", index, *names)
        # torch hands out parts of larger pieces of memory: without that, a write beside a tensor is found.
        output, ending = run_tool(
            [tool, "--tool", check, *_QUIET, "--error-exitcode", "9", *test],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        (setting.folder / f"{check}.txt").write_text(output, encoding="utf-8")
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        clean = ending == "exit code 0" and found and re.match(r"0 (errors|hazards)", found[-1])
        said = found[-1] if found else f"no summary, {ending}; see {check}.txt"
        rows.append(passed_or_failed(f"{check}: {', '.join(names)}", [] if clean else [said, ending], said))
    return rows


def find_tool(name: str) -> str:
    """Path of one of NVIDIA's tools; empty where it is not installed."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *TOOL_FOLDERS))
    return shutil.which(name, path=path) or ""


def run_tool(command: Sequence[str], variables: dict[str, str]) -> tuple[str, str]:
    """Runs a command of this Python under a tool: all that was said, and how it ended."""
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TOOL_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return said, f"no end after {TOOL_LIMIT_S:g} s"
    return done.stdout, f"exit code {done.returncode}"
