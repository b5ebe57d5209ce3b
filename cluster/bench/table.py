"""One table of several benchmarks: a row for each mode, a group of columns for each data set and temperature."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BASELINES = "transformers"


@dataclass(frozen=True)
class BenchFile:
    """What `outrider bench --json` wrote, and what the table calls its drafter.

    Attributes:
        drafter: stands before the mode's name; may be empty.
        document: the JSON.
    """

    drafter: str
    document: dict[str, Any]

    @property
    def column(self) -> str:
        """Which columns its figures belong in."""
        settings = self.document["settings"]
        data = Path(settings["data"]).stem
        temperature = settings["sampling"]["temperature"]
        how = "greedy" if temperature == 0 else f"T = {temperature:g}"
        return f"{data}, {settings['num_prompts']} prompts, {how}"


def read_bench_file(argument: str) -> BenchFile:
    """`FILE` or `NAME=FILE`.

    Raises:
        ValueError: names the file and what it lacks.
    """
    drafter, _, path = argument.rpartition("=")
    try:
        document = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        file = BenchFile(drafter, document)
        if not file.column or not document["summaries"]:
            raise ValueError("it has no summaries")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file that `outrider bench --json` wrote: {error!r}") from error
    return file


def markdown(files: Sequence[BenchFile]) -> str:
    """A table in Markdown: acceptance length, and tokens per second over plain decoding and over the best mode of
    transformers in the same run (a dash where it had none)."""
    columns = list(dict.fromkeys(file.column for file in files))
    cells: dict[str, dict[str, str]] = {}
    for file in files:
        rates = {s["mode"]: s["tokens_per_s"] for s in file.document["summaries"] if s["concurrency"] == 1}
        plain = rates.get("plain", math.nan)
        best = max((rate for mode, rate in rates.items() if mode.startswith(_BASELINES)), default=math.nan)
        for summary in file.document["summaries"]:
            mode = summary["mode"]
            if summary["concurrency"] != 1 or mode == "plain" or mode.startswith(_BASELINES):
                continue
            row = f"{mode} ({file.drafter})" if file.drafter else mode
            length, rate = summary["acceptance_length"], summary["tokens_per_s"]
            cells.setdefault(row, {})[file.column] = " / ".join(
                (_number(length), _times(rate, plain), _times(rate, best))
            )
    lines = [["drafts", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(found.get(column, "-") for column in columns)] for row, found in cells.items()]
    return "\n".join(_line(line) for line in lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _times(rate: float, reference: float) -> str:
    return "-" if math.isnan(reference) or not reference else f"{rate / reference:.2f}x"
