"""`outrider bench --host`: what rounds cost on the host besides the models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from outrider.cluster.bench.machine import describe_machine
from outrider.configs.schema import Config
from outrider.workers.host_time import TREE_NODES, measure_host_time
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.setup import read_model_config

NUM_SEQUENCES = (1, 8, 32)
GREEDY = SamplingParams(temperature=0.0)
TOP_P = SamplingParams(temperature=0.8, top_p=0.9)


@dataclass(frozen=True)
class HostReport:
    """Processor milliseconds of a round by number of sequences, drafter and target together.

    loop_ms: of rounds of greedy requests; sampling_ms: by kind of request.
    """

    loop_ms: dict[int, float]
    sampling_greedy_ms: dict[int, float]
    sampling_top_p_ms: dict[int, float]


def measure(config: Config) -> HostReport:
    """Of the target's vocabulary, on one thread."""
    model = read_model_config(config, "target", lambda what, done, total: None)
    greedy = {n: measure_host_time(model, config, n, GREEDY) for n in NUM_SEQUENCES}
    sampled = {n: measure_host_time(model, config, n, TOP_P) for n in NUM_SEQUENCES}
    return HostReport(
        {n: time.loop_ms for n, time in greedy.items()},
        {n: time.sampling_ms for n, time in greedy.items()},
        {n: time.sampling_ms for n, time in sampled.items()},
    )


def show(report: HostReport, console: Console) -> None:
    """A row per number of sequences."""
    table = Table(title=f"host time of a round, CPU ms; trees of {TREE_NODES} nodes", title_justify="left")
    for column in ("sequences", "loop, drafting, messages", "sampling, greedy", "sampling, T 0.8, top-p 0.9"):
        table.add_column(column, justify="right")
    for n, loop_ms in report.loop_ms.items():
        values = (loop_ms, report.sampling_greedy_ms[n], report.sampling_top_p_ms[n])
        table.add_row(str(n), *(f"{value:.2f}" for value in values))
    console.print(table)


def write_json(report: HostReport, config: Config, path: Path) -> None:
    """`host_ms` by number of sequences: `loop`, `sampling_greedy`, `sampling_top_p`."""
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "target": config.target.model,
        "num_tree_nodes": TREE_NODES,
        "host_ms": {
            str(n): {
                "loop": loop_ms,
                "sampling_greedy": report.sampling_greedy_ms[n],
                "sampling_top_p": report.sampling_top_p_ms[n],
            }
            for n, loop_ms in report.loop_ms.items()
        },
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
