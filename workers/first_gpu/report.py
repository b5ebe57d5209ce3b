"""What a part of the check has found: rows of a table on the terminal, a JSON file per part, a summary of all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from outrider.workers.first_gpu.expected import OUT_OF_REACH, UNKNOWN, Figure

Verdict = Literal["passed", "FAILED", "measured", "not run"]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        what: what was looked at.
        measured: what was seen, with its unit; why not, where it was not run.
        beside: what `expected.py`, a roofline or a reference says.
        values: the numbers, by name with unit (`time_ms`), for programs.
    """

    what: str
    measured: str
    verdict: Verdict = "measured"
    beside: str = ""
    values: tuple[tuple[str, float], ...] = ()


def not_run(what: str, why: str) -> Row:
    return Row(what, why, "not run")


def passed_or_failed(what: str, problems: Sequence[str], fine: str, beside: str = "") -> Row:
    """A row that fails with its problems."""
    return Row(what, "; ".join(problems) or fine, "FAILED" if problems else "passed", beside)


def milliseconds(what: str, seconds: float, figure: Figure = UNKNOWN) -> Row:
    """A time beside what was expected of it and the least that the hardware allows."""
    known = [(name, ms) for name, ms in (("planned", figure.planned_ms), ("least", figure.least_ms)) if ms]
    values = (("time_ms", seconds * 1e3), *((f"{name}_ms", ms) for name, ms in known))
    beside = ", ".join(f"{name} {ms:.3g} ms" for name, ms in known)
    return Row(what, f"{seconds * 1e3:.3f} ms", "measured", beside, values)


@dataclass(frozen=True)
class PartReport:
    """One part on one machine; `traceback` where it was cut short."""

    number: int
    title: str
    device: str
    seconds: float
    rows: tuple[Row, ...]
    traceback: str = ""

    @property
    def failed(self) -> bool:
        return any(row.verdict == "FAILED" for row in self.rows)


def table(rows: Iterable[Row]) -> str:
    """Columns of text: what, measured, beside, verdict."""
    cells = [(row.what, row.measured, row.beside, row.verdict) for row in rows]
    widths = [min(64, max((len(line[i]) for line in cells), default=0)) for i in range(3)]
    return "\n".join(
        "  ".join((*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]))
        for line in cells
    )


def write(report: PartReport, folder: Path) -> Path:
    """`part-NN.json` in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{report.number:02}.json"
    path.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return path


def read_all(folder: Path) -> list[PartReport]:
    """The parts that lie in a folder, by number."""
    reports = []
    for path in sorted(folder.glob("part-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(
            Row(**{**row, "values": tuple((name, value) for name, value in row["values"])})
            for row in found.pop("rows")
        )
        reports.append(PartReport(**found, rows=rows))
    return reports


def summary(reports: Sequence[PartReport], titles: Sequence[str]) -> str:
    """All parts in a few lines each: how they ended, what failed, what has a figure beside it, what was not run."""
    by_number = {report.number: report for report in reports}
    lines = []
    for number, title in enumerate(titles, 1):
        report = by_number.get(number)
        if report is None:
            lines.append(f"{number:2}. {title}: not run")
            continue
        counts = Counter(row.verdict for row in report.rows)
        said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        lines.append(f"{number:2}. {title}: {said} ({report.seconds:.0f} s on {report.device})")
        shown = [row for row in report.rows if row.verdict == "FAILED" or row.beside]
        lines += [f"    {line}" for line in table(shown).splitlines()]
    lines += ["", "Out of reach on one GPU:", table(not_run(what, why) for what, why in OUT_OF_REACH)]
    return "\n".join(lines)


def write_summary(reports: Sequence[PartReport], titles: Sequence[str], folder: Path) -> None:
    """`summary.txt`, and `summary.json` with all parts in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.txt").write_text(summary(reports, titles) + "\n", encoding="utf-8")
    parts = [asdict(report) for report in reports]
    whole = {
        "failed": any(report.failed for report in reports),
        "parts": parts,
        "not_run": dict(OUT_OF_REACH),
    }
    (folder / "summary.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
