"""How much of a target's text a vocabulary of each size has, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

_COLOURS = ("#a9aeb4", "#c8553d")


def draw_coverage(
    sizes: Sequence[int], curves: Mapping[str, Sequence[float]], chosen: int, title: str, path: Path
) -> None:
    """Writes a PNG (or whatever format the suffix says): `curves` by name over `sizes`, and the size taken."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(curves.items(), _COLOURS, strict=True):
        axes.plot(sizes, values, label=name, color=colour, lw=1.8)
    axes.axvline(chosen, color="#2f3437", lw=1.0, ls=":")
    axes.annotate(f" {chosen} tokens", (chosen, axes.get_ylim()[0]), fontsize=9, va="bottom")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("size of the vocabulary")
    axes.set_ylabel("tokens of the target's text that it has")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=144)
