"""Changes of a text at one place, and records of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outrider.workers.training.judges.records import SpanRecord


@dataclass(frozen=True)
class Edit:
    """Characters `start` to `end` (not included) become `text`.

    Attributes:
        kind: of the mistake or the variation.
        num_marked: leading characters of `text` that are the mistake; by default all of them.
    """

    kind: str
    start: int
    end: int
    text: str
    num_marked: int | None = None

    def apply(self, text: str) -> str:
        return text[: self.start] + self.text + text[self.end :]


def apply_all(edits: Iterable[Edit], text: str) -> str:
    """Edits that do not overlap, all at once."""
    for edit in sorted(edits, key=lambda edit: -edit.start):
        text = edit.apply(text)
    return text


def of_all_kinds(edits: Sequence[Edit], most: int, generator: random.Random) -> list[Edit]:
    """At most so many, of as many kinds as there are."""
    by_kind: dict[str, list[Edit]] = {}
    for edit in generator.sample(list(edits), len(edits)):
        by_kind.setdefault(edit.kind, []).append(edit)
    queues = generator.sample(list(by_kind.values()), len(by_kind))
    found: list[Edit] = []
    while queues and len(found) < most:
        found += [queue.pop() for queue in queues[: most - len(found)]]
        queues = [queue for queue in queues if queue]
    return found


def mistake_record(
    problem: str, domain: str, question: str, right: str, edit: Edit, number: int
) -> SpanRecord:
    """A record of a mistake that an edit makes of a right answer."""
    marked = len(edit.text) if edit.num_marked is None else edit.num_marked
    span = {"start": edit.start, "end": edit.start + marked}
    return SpanRecord.model_validate(
        {
            "id": f"{problem}/{number}-{edit.kind}",
            "problem": problem,
            "domain": domain,
            "question": question,
            "right": right,
            "wrong": edit.apply(right),
            "span": span,
            "kind": edit.kind,
        }
    )


def right_record(problem: str, domain: str, question: str, right: str, kind: str, number: int) -> SpanRecord:
    """A record of a right answer more."""
    return SpanRecord(
        id=f"{problem}/{number}-{kind}",
        problem=problem,
        domain=domain,
        question=question,
        right=right,
        kind=kind,
    )
