"""What a judge is worth, as pictures: on held-out mismatches, and in service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from outrider.workers.training.judges.measures import Curves

_JUDGE = "#c8553d"
_OTHERS = ("#8a9199", "#588b8b", "#b8a15a", "#7d6b91", "#2f3437")


def draw_curves(curves: Mapping[str, Curves], labels: Mapping[str, str], title: str, path: Path) -> None:
    """Writes a PNG: the ROC and precision-recall curves by name, the judge's first; `labels` stand in the legend."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    roc, precision = figure.subplots(1, 2)
    for place, (name, found) in enumerate(curves.items()):
        colour, width = (_JUDGE, 2.2) if not place else (_OTHERS[(place - 1) % len(_OTHERS)], 1.3)
        roc.plot(found.false_alarms, found.recalls, label=labels[name], color=colour, lw=width)
        precision.plot(found.pr_recalls, found.pr_precisions, color=colour, lw=width)
    roc.plot((0, 1), (0, 1), color="#c9ccd0", lw=1.0, ls=":")
    roc.set_xlabel("harmless mismatches refused")
    roc.set_ylabel("harmful tokens refused")
    precision.set_xlabel("harmful tokens refused")
    precision.set_ylabel("harmful among the refused")
    for axes in (roc, precision):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.01)
        axes.grid(alpha=0.3)
    roc.legend(loc="lower right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=144)


@dataclass(frozen=True)
class TradeOffPoint:
    """A rule in service: its acceptance length, its accuracy and the ends of its 95 % interval."""

    rule: str
    label: str
    acceptance_length: float
    accuracy: float
    low: float
    high: float


def draw_trade_off(points: Sequence[TradeOffPoint], title: str, path: Path) -> None:
    """Writes a PNG: accuracy over acceptance length, the points of one rule joined."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.subplots()
    colours = {"exact": _OTHERS[-1], "typical": _OTHERS[1], "judge": _JUDGE}
    for rule in dict.fromkeys(point.rule for point in points):
        of_rule = sorted((p for p in points if p.rule == rule), key=lambda point: point.acceptance_length)
        lengths, accuracies = [p.acceptance_length for p in of_rule], [p.accuracy for p in of_rule]
        # Rounding may put a bound of an interval on the wrong side of its middle by the last digit.
        below = [max(0.0, p.accuracy - p.low) for p in of_rule]
        above = [max(0.0, p.high - p.accuracy) for p in of_rule]
        axes.errorbar(
            lengths,
            accuracies,
            (below, above),
            color=colours[rule],
            marker="o",
            ms=5,
            lw=1.5,
            elinewidth=0.8,
            label=rule,
        )
        for p in of_rule:
            axes.annotate(f" {p.label}", (p.acceptance_length, p.accuracy), fontsize=8, va="bottom")
    axes.set_xlabel("acceptance length (tokens per target step)")
    axes.set_ylabel("tasks answered rightly, with 95 % intervals")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=144)
