"""What to do with the first GPU: `python -m outrider.workers.first_gpu PART... --folder FOLDER`.

Twelve parts, each alone and in less than ten minutes; `all` runs them in order, `summary` puts together what lies in
the folder. From a bare checkout, without Ray; see docs/gpu.md. On a CPU everything is tiny: that only shows that it
runs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.workers.first_gpu.report import PartReport, Row, read_all, summary, table, write, write_summary
from outrider.workers.first_gpu.setting import FULL, TINY, Setting

# By module, the wheel that brings it.
WHEELS = {"cuda.core": "cuda-core", "cuda.bindings": "cuda-bindings", "yaml": "pyyaml"}
WORKERS = ("psutil", "yaml", "gguf", "transformers", "llguidance")


@dataclass(frozen=True)
class Part:
    """One part: where its function is, and the modules that a bare machine may lack.

    `on_gpu` is needed where kernels are launched; a CPU gets along without.
    """

    title: str
    function: str
    needs: tuple[str, ...] = ()
    on_gpu: tuple[str, ...] = ("cuda.core",)


PARTS = (
    Part("versions, NVRTC, self-test", "machine.machine", ("cuda.bindings", "psutil")),
    Part("every kernel case against float64", "machine.kernels"),
    Part("compute-sanitizer", "machine.sanitizer"),
    Part("a small model: kernels, SDPA, CPU; graph and eager", "small_model.small_model", ("psutil",)),
    Part(
        "target and drafter as processes: speculative and plain", "deployments.speculative_and_plain", WORKERS
    ),
    Part("two ranks over gloo, one over NCCL", "deployments.ranks", WORKERS),
    Part("replays of rank 0 of a 70B over 7", "large_model.replays", ("psutil",)),
    Part("matrix products and sampling of that rank", "large_model.products", ("psutil",)),
    Part("end to end, with trace and profile", "deployments.end_to_end", WORKERS),
    Part("attention alone: times, ncu", "ncu.attention_alone", ("psutil",)),
    Part("quantised weights and FP8 cache", "quantised.quantised", ("psutil", "yaml", "gguf")),
    Part("drafters that read hidden rows; sampling's edits", "hidden_drafters.hidden_drafters", WORKERS),
)
TITLES = tuple(part.title for part in PARTS)


def missing_wheels(part: Part, on_gpu: bool) -> list[str]:
    """What has to be brought along for a part to run here."""
    missing = []
    for module in (*part.needs, *(part.on_gpu if on_gpu else ())):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the package that the module is in
            found = None
        if found is None:
            missing.append(WHEELS.get(module, module))
    return missing


def run_part(number: int, setting: Setting) -> PartReport:
    """Runs one part; whatever goes wrong in it is a row of its report."""
    part = PARTS[number - 1]
    setting.folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name(setting.device) if setting.on_gpu else "CPU"
    begun, trace = time.monotonic(), ""
    if missing := missing_wheels(part, setting.on_gpu):
        wheels = " ".join(missing)
        rows = [Row(part.title, f"missing: {wheels} (pip install --target FOLDER {wheels})", "not run")]
    else:
        try:
            module, name = part.function.split(".")
            rows = getattr(importlib.import_module(f"outrider.workers.first_gpu.{module}"), name)(setting)
        except Exception as error:  # a part that fails must not take the others' half hour
            trace = traceback.format_exc()
            rows = [Row(part.title, f"{type(error).__name__}: {error}", "FAILED")]
    return PartReport(number, part.title, device, time.monotonic() - begun, tuple(rows), trace)


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 when something failed, 2 when there is no GPU that was asked for."""
    names = [str(number) for number in range(1, len(PARTS) + 1)]
    parser = argparse.ArgumentParser(
        prog="python -m outrider.workers.first_gpu",
        description=__doc__,
        epilog="\n".join(f"{number:>2}  {title}" for number, title in zip(names, TITLES, strict=True)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", metavar="PART", choices=[*names, "all", "summary"])
    parser.add_argument("--folder", type=Path, default=Path("build/first-gpu"), help="for reports and traces")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args(arguments)
    usable = torch.cuda.is_available()
    if options.device == "cuda" and not usable:
        print(f"there is no GPU that torch {torch.__version__} can use")
        return 2
    on_gpu = usable and options.device != "cpu"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    setting = Setting(device, FULL if on_gpu else TINY, options.folder)
    numbers = (
        range(1, len(PARTS) + 1) if "all" in options.parts else [int(p) for p in options.parts if p in names]
    )
    for number in numbers:
        print(f"\n{number}. {TITLES[number - 1]}", flush=True)
        report = run_part(number, setting)
        path = write(report, options.folder)
        print(f"{table(report.rows)}\n{report.traceback}{report.seconds:.1f} s, {path}", flush=True)
    reports = read_all(options.folder)
    write_summary(reports, TITLES, options.folder)
    print(f"\n{summary(reports, TITLES)}")
    return int(any(report.failed for report in reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
