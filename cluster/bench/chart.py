"""A benchmark as one picture: speed, acceptance by depth, where the workers' time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from outrider.cluster.bench.metrics import ModeSummary
from outrider.cluster.bench.report import BenchReport, well_founded_rates

_COLOUR_OF_MODE = {"outrider": "#c8553d", "plain": "#588b8b"}
_OTHER_MODE = "#a9aeb4"
_COLOUR_OF_KIND = {
    "forward": "#588b8b",
    "draft": "#c8553d",
    "verify": "#f28f3b",
    "sample": "#8a6fb0",
    "commit": "#4d6cb0",
    "communicate": "#d9b44a",
    "schedule": "#6b4f3a",
    "wait": "#e6e8eb",
}


def write_chart(report: BenchReport, path: Path) -> None:
    """Writes a PNG (or whatever format the suffix says)."""
    summaries = list(report.summaries)
    with_depths = [summary for summary in summaries if well_founded_rates(summary)]
    with_workers = [summary for summary in summaries if summary.mode == "outrider" and summary.time_share]
    num_panels = 1 + bool(with_depths) + bool(with_workers)
    height = max(3.2, 1.2 + 0.5 * len(summaries))
    figure = Figure(figsize=(5.6 * num_panels, height), layout="constrained")
    grid = figure.subplots(1, num_panels, squeeze=False)
    panels = list(grid[0])
    _draw_speed(panels.pop(0), summaries)
    if with_depths:
        _draw_depths(panels.pop(0), with_depths)
    if with_workers:
        _draw_workers(panels.pop(0), with_workers)
    figure.suptitle(str(report.settings.get("title", "outrider bench")), fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=144)


def _draw_speed(axes: Axes, summaries: Sequence[ModeSummary]) -> None:
    rows = range(len(summaries))
    axes.barh(
        rows,
        [summary.tokens_per_s for summary in summaries],
        color=[_COLOUR_OF_MODE.get(summary.mode, _OTHER_MODE) for summary in summaries],
        height=0.65,
    )
    widest = 0.0
    for row, summary in zip(rows, summaries, strict=True):
        spread = summary.tokens_per_s_of_runs
        end = summary.tokens_per_s
        if summary.concurrency == 1 and spread.num_values > 1:
            axes.plot([spread.lower_quartile, spread.upper_quartile], [row, row], color="#2f3437", lw=1.2)
            end = max(end, spread.upper_quartile)
        axes.annotate(
            f"{summary.tokens_per_s:.1f}", (end, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
        widest = max(widest, end)
    axes.set_yticks(rows, [summary.label for summary in summaries])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * widest if widest > 0 else 1)
    _style(axes, "Tokens per second (line: quartiles over answers)")


def _draw_depths(axes: Axes, summaries: Sequence[ModeSummary]) -> None:
    deepest = 1
    for summary in summaries:
        rates = well_founded_rates(summary)
        depths = range(1, len(rates) + 1)
        axes.plot(depths, [100 * rate for rate in rates], marker="o", label=summary.label)
        deepest = max(deepest, len(rates))
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 103)
    axes.set_xlabel("depth of the drafted token")
    if len(summaries) > 1:
        axes.legend(frameon=False)
    _style(axes, "Accepted, % (of tokens below accepted ones)")


def _draw_workers(axes: Axes, summaries: Sequence[ModeSummary]) -> None:
    bars = [(summary, worker) for summary in summaries for worker in summary.time_share]
    several = len(summaries) > 1
    left = [0.0] * len(bars)
    for kind, colour in _COLOUR_OF_KIND.items():
        widths = [100 * summary.time_share[worker].get(kind, 0.0) for summary, worker in bars]
        if any(widths):
            axes.barh(range(len(bars)), widths, left=left, color=colour, height=0.65, label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    names = [f"{worker}, x{s.concurrency}" if several else worker for s, worker in bars]
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.legend(frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=8)
    _style(axes, "Where the workers' time goes, %")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
