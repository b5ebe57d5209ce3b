"""Part 10: attention alone: its times, and what Nsight Compute says of it at 64 rows behind 8k tokens."""

from __future__ import annotations

import csv
import sys

from outrider.kernels.roofline import least_time_s, roofline_of
from outrider.workers.first_gpu.machine import find_tool, run_tool
from outrider.workers.first_gpu.one_attention import attention_times
from outrider.workers.first_gpu.report import Row, not_run, passed_or_failed
from outrider.workers.first_gpu.setting import Setting

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis")
METRICS = (
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "L2 Hit Rate",
    "Achieved Occupancy",
    "Registers Per Thread",
    "Grid Size",
    "Waves Per SM",
)
# Keys and values of 8192 + 64 tokens, two heads of 128 in bfloat16; products of 64 rows of 16 heads with them.
KV_BYTES = 2 * (8192 + 64) * 2 * 128 * 2
FLOPS = 4 * 64 * 16 * 128 * (8192 + 64)


def attention_alone(setting: Setting) -> list[Row]:
    return attention_times(setting) + attention_by_ncu(setting)


def attention_by_ncu(setting: Setting) -> list[Row]:
    tool = find_tool("ncu")
    if not tool:
        return [not_run("attention at 64 rows, 8k", "ncu is not on the PATH")]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    filters = ["--kernel-name", "regex:tree_attention.*", "--launch-count", "1"]
    program = [sys.executable, "-P", "-m", "outrider.workers.first_gpu.one_attention"]
    output, ending = run_tool([tool, "--csv", *sections, *filters, *program], {})
    (setting.folder / "ncu.csv").write_text(output, encoding="utf-8")
    metrics = read_metrics(output)
    if not metrics:
        last = (output.strip().splitlines() or ["nothing was said"])[-1]
        return [passed_or_failed("attention at 64 rows, 8k", [f"{ending}: {last}"], "")]
    least_us = least_time_s(KV_BYTES, FLOPS, roofline_of("H100")) * 1e6
    beside = {"Duration": f"least on an H100 {least_us:.1f} us", "Grid Size": "132 multiprocessors"}
    return [
        Row(f"attention at 64 rows, 8k: {name}", metrics[name], beside=beside.get(name, ""))
        for name in METRICS
        if name in metrics
    ]


def read_metrics(output: str) -> dict[str, str]:
    """Values with their units, by metric, from the CSV that ncu prints among other lines."""
    lines = output.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(line for line in lines[header:] if line.startswith('"'))
    return {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in rows}
