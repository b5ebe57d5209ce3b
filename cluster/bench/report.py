"""The result of a benchmark as tables for a terminal and as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from outrider.cluster.bench.metrics import Agreement, ModeSummary, Spread, non_model_share
from outrider.cluster.bench.runner import Turn
from outrider.workers.trace import SPAN_KINDS

_PADDING = (0, 1, 0, 0)
_SHORT = {"communicate": "comm.", "schedule": "sched."}
_WIDTH_OF_A_PIPE = 110
_FEWEST_ROUNDS = 10  # a rate of fewer is noise


@dataclass(frozen=True)
class BenchReport:
    """Everything that was measured and how."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Config, data, sampling, threads: JSON-ready."""

    summaries: Sequence[ModeSummary]
    agreements: Sequence[Agreement]
    peak_memory_bytes: Mapping[str, int]
    """Per process: highest resident memory, loading included."""

    turns: Sequence[Turn]

    @property
    def reference(self) -> ModeSummary | None:
        """What the others are compared with: transformers' plain decoding, else our own."""
        for mode in ("transformers", "plain"):
            for summary in self.summaries:
                if (summary.mode, summary.concurrency) == (mode, 1):
                    return summary
        return None


def write_json(report: BenchReport, path: Path) -> None:
    """One object; figures that do not exist for a mode are null."""
    document = {
        "machine": report.machine,
        "settings": report.settings,
        "summaries": [
            {"label": summary.label, **dataclasses.asdict(summary)} for summary in report.summaries
        ],
        "agreements": [dataclasses.asdict(agreement) for agreement in report.agreements],
        "peak_memory_bytes": dict(report.peak_memory_bytes),
        "turns": [dataclasses.asdict(turn) for turn in report.turns],
    }
    path.write_text(json.dumps(_jsonable(document), indent=1) + "\n", encoding="utf-8")


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_PIPE)


def show(report: BenchReport, console: Console) -> None:
    """Prints the tables."""
    console.print(render(report))


def render(report: BenchReport) -> RenderableType:
    parts: list[RenderableType] = [_speed_table(report)]
    if any(summary.time_share for summary in report.summaries):
        parts.append(_worker_table(report))
    categories = {name for summary in report.summaries for name in summary.tokens_per_s_by_category}
    if len(categories) > 1:
        parts.append(_category_table(report, sorted(categories)))
    parts.append(_agreement_lines(report.agreements))
    return Group(*parts)


def _speed_table(report: BenchReport) -> Table:
    reference = report.reference
    table = Table(title="Speed", title_justify="left", box=SIMPLE, padding=_PADDING)
    table.add_column("mode", no_wrap=True)
    for heading in ("tokens/s", "per answer", "x", "first ms", "ms/token", "tree", "accepted", "length"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in report.summaries:
        factor = summary.tokens_per_s / reference.tokens_per_s if reference else math.nan
        table.add_row(
            summary.label,
            _number(summary.tokens_per_s, 1),
            _spread(summary.tokens_per_s_of_runs, 1.0, 1),
            _number(factor, 2),
            _spread(summary.ttft_s, 1e3, 0),
            _spread(summary.time_per_token_s, 1e3, 1),
            _number(summary.nodes_per_step, 1),
            _percent(summary.acceptance_rate),
            _number(summary.acceptance_length, 2),
        )
    drafting = [summary for summary in report.summaries if well_founded_rates(summary)]
    reference_name = reference.label if reference else "nothing"
    table.caption = (
        "± half the distance of the quartiles; per answer: tokens/s up to its last token;\n"
        f"x: against {reference_name}; first ms: to the first token;\n"
        "tree: drafted nodes of a sequence per step of the target, its root not counted;\n"
        "accepted: of drafted tokens; length: tokens per step of the target"
        + "".join(f"\n{summary.label}, accepted by depth: {_depths(summary)}" for summary in drafting)
    )
    table.caption_justify = "left"
    return table


def well_founded_rates(summary: ModeSummary) -> list[float]:
    """`acceptance_by_depth` down to the last depth that was drafted often enough to tell a rate."""
    rates = []
    for rate, num_rounds in zip(summary.acceptance_by_depth, summary.rounds_by_depth, strict=True):
        if num_rounds < _FEWEST_ROUNDS:
            break
        rates.append(rate)
    return rates


def _depths(summary: ModeSummary) -> str:
    return " ".join(f"{100 * rate:.0f}%" for rate in well_founded_rates(summary))


def _worker_table(report: BenchReport) -> Table:
    used = {kind for s in report.summaries for shares in s.time_share.values() for kind in shares}
    kinds = [kind for kind in SPAN_KINDS if kind in used]
    table = Table(title="Share of the time by worker, %", title_justify="left", box=SIMPLE, padding=_PADDING)
    table.add_column("mode", no_wrap=True)
    table.add_column("worker", no_wrap=True)
    for heading in ("busy", *kinds, "MB"):
        table.add_column(_SHORT.get(heading, heading), justify="right", no_wrap=True)
    notes = []
    for summary in report.summaries:
        for worker, shares in summary.time_share.items():
            peak = report.peak_memory_bytes.get(worker, 0)
            table.add_row(
                summary.label,
                worker,
                _number(100 * summary.busy_share[worker], 1),
                *(_number(100 * shares.get(kind, math.nan), 1) for kind in kinds),
                f"{peak / 1e6:.0f}" if peak else "-",
            )
        if summary.time_share:
            parts = non_model_share(summary, round_workers(summary))
            listed = ", ".join(f"{kind} {_percent(share)}" for kind, share in sorted(parts.items()))
            notes.append(f"{summary.label}: {_percent(sum(parts.values()))} not in a model: {listed}")
    others = [name for name in report.peak_memory_bytes if name not in report.summaries[0].time_share]
    notes += [f"{name}: {report.peak_memory_bytes[name] / 1e6:.0f} MB at most" for name in others]
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table


def round_workers(summary: ModeSummary) -> list[str]:
    """Whose work makes a round longer: the DraftWorker and the first rank (the other ranks do the same)."""
    return [worker for worker in summary.time_share if worker == "draft" or worker == "target 0"]


def _category_table(report: BenchReport, categories: Sequence[str]) -> Table:
    table = Table(title="Tokens/s by category", title_justify="left", box=SIMPLE, padding=_PADDING)
    table.add_column("category", no_wrap=True)
    for summary in report.summaries:
        table.add_column(summary.label, justify="right")
    for category in categories:
        table.add_row(
            Text(category),
            *(_number(s.tokens_per_s_by_category.get(category, math.nan), 1) for s in report.summaries),
        )
    return table


def _agreement_lines(agreements: Sequence[Agreement]) -> Text:
    lines = Text()
    for agreement in agreements:
        if agreement.one != agreements[0].one:
            continue  # the JSON has all pairs
        equal = agreement.num_equal == agreement.num_prompts
        lines.append(f"{agreement.one} = {agreement.other}: ", style="bold")
        lines.append(
            f"the same tokens on {agreement.num_equal} of {agreement.num_prompts} prompts\n",
            style="green" if equal else "yellow",
        )
    return lines


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if math.isfinite(value) else "-"


def _spread(spread: Spread, unit: float, digits: int) -> str:
    if spread.num_values == 0:
        return "-"
    half = unit * (spread.upper_quartile - spread.lower_quartile) / 2
    return f"{unit * spread.median:.{digits}f} ±{half:.{digits}f}"


def _jsonable(value: Any) -> Any:
    """JSON has no NaN; `None` says that a figure does not exist."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case _:
            return value
