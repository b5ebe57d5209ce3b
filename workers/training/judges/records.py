"""Questions with a right answer and a wrong one whose mistake is marked: the form that Judge Decoding is trained on
(arXiv 2501.19309, section 4), a JSON object a line.

    {"id": "17-operator", "problem": "17", "domain": "gsm8k", "question": "Tom has 3 bags …",
     "right": "3 * 4 = 12 apples.", "wrong": "3 + 4 = 7 apples.", "span": {"start": 2, "end": 3}, "kind": "operator"}

`question` is a text or a list of messages, which goes through the chat template. `span` says where the mistake is in
`wrong`: the places of its characters (`end` not included), or its text where that occurs once. A record without
`wrong` has a right answer more: another route to the same result, other words, other names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from outrider.workers.training.lines import read_objects

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(BaseModel):
    """One message of a conversation."""

    model_config = _STRICT

    role: Literal["system", "user", "assistant"]
    content: str


class Span(BaseModel):
    """Characters `start` to `end`, the latter not included; counted in Unicode code points from 0."""

    model_config = _STRICT

    start: int = Field(ge=0)
    end: int = Field(ge=1)


class SpanRecord(BaseModel):
    """A question, a right answer, and a wrong one with its first mistake marked."""

    model_config = _STRICT

    id: str = Field(min_length=1)
    """Unique in its file."""

    problem: str = ""
    """What the question is about: records of one problem are trained on or measured on together. Empty: the id."""

    domain: str = Field(min_length=1)
    """Kind of task, such as gsm8k or code: measured apart, and named by the judge."""

    question: str | tuple[Message, ...] = Field(min_length=1)
    """Asked through the chat template."""

    right: str = Field(min_length=1)
    """All of its tokens are good."""

    wrong: str | None = None
    """Tokens before the mistake are good, those of the mistake bad; what follows is not used."""

    span: Span | str | None = None
    """Of the first mistake in `wrong`."""

    kind: str = Field(min_length=1)
    """Of the mistake, or of the variation where there is none; measured apart."""

    @model_validator(mode="after")
    def _has_its_mistake(self) -> SpanRecord:
        if (self.wrong is None) != (self.span is None):
            raise ValueError("wrong and span must come together")
        if self.wrong is not None:
            self.mistake()
        return self

    @property
    def group(self) -> str:
        """The problem, by domain."""
        return f"{self.domain}/{self.problem or self.id}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as the chat template takes it."""
        if isinstance(self.question, str):
            return [{"role": "user", "content": self.question}]
        return [message.model_dump() for message in self.question]

    def mistake(self) -> tuple[int, int]:
        """First character of the mistake in `wrong`, and the one behind its last. Raises ValueError."""
        assert self.wrong is not None
        assert self.span is not None
        if isinstance(self.span, str):
            if not self.span or self.wrong.count(self.span) != 1:
                found = self.wrong.count(self.span) if self.span else 0
                raise ValueError(
                    f"span must be a text that occurs once in wrong, got {self.span!r}: {found} times"
                )
            start = self.wrong.index(self.span)
            return start, start + len(self.span)
        if not self.span.start < self.span.end <= len(self.wrong):
            raise ValueError(
                f"span must have start < end <= {len(self.wrong)} (characters of wrong), got {self.span.start} "
                f"and {self.span.end}"
            )
        return self.span.start, self.span.end


def read_records(path: Path) -> Iterator[SpanRecord]:
    """Raises ValueError naming file, line and field of what is no record, and an id that occurs twice."""
    if not path.is_file():
        raise ValueError(f"--records must be a .jsonl file, got {str(path)!r} (no such file)")
    ids: set[str] = set()
    for number, fields in read_objects(path):
        where = f"{path}, line {number}"
        try:
            # Of JSON, not of Python: a list is a tuple there.
            record = SpanRecord.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: {field + ': ' if field else ''}{said}") from error
        if record.id in ids:
            raise ValueError(f"{where}: id must be unique in the file, got {record.id!r} again")
        ids.add(record.id)
        yield record


def write_records(path: Path, records: Iterable[SpanRecord]) -> int:
    """Writes a file that `read_records` reads; returns how many there are."""
    count = 0
    unfinished = path.with_suffix(path.suffix + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.model_dump_json(exclude_none=True) + "\n")
            count += 1
    unfinished.replace(path)
    return count
