"""Texts that the target wrote, as files: what `outrider distill` writes and trainers read.

A directory as in `lines`: `distill.json` says what wrote the texts, `texts-00000.jsonl`, `texts-00001.jsonl`, … hold
one text per line. Tokens are the truth; text stands beside them only where it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.workers.training.lines import (
    FORMAT,
    Description,
    Layout,
    LineWriter,
    read_description,
    read_objects,
)

WRITTEN = "written"
"""`DistilledText.source` of prompts that the target wrote itself."""

_TEXTS_PER_FILE = 20_000


@dataclass(frozen=True)
class DistilledText:
    """One answer of the target.

    Attributes:
        id: unique in its directory.
        prompt_tokens: token ids, those of the chat template included.
        output_tokens: token ids that the target gave, the end-of-text token included where it came.
        temperature: of the answer.
        template: whether the prompt went through the chat template.
        source: `WRITTEN`, or the name of the file that the prompt is from.
        finish_reason: "stop" or "length".
        text: of the output, where it is kept; else empty.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    temperature: float
    template: bool
    source: str
    finish_reason: str
    text: str = ""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and output."""
        return self.prompt_tokens + self.output_tokens


def load_description(directory: Path) -> Description:
    """Raises ValueError where there is none, or one of another format."""
    return read_description(directory, _layout(_TEXTS_PER_FILE))


def read_texts(directory: Path) -> Iterator[DistilledText]:
    """All texts, in the order in which they were written; of a run that is under way those that are whole.

    Raises ValueError naming file and line of what is no text.
    """
    for path in _layout(_TEXTS_PER_FILE).files(directory):
        for number, fields in read_objects(path):
            try:
                yield _text_of(fields)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no text of format {FORMAT} ({error!r})") from error


class TextWriter(LineWriter):
    """Appends texts to a directory."""

    def __init__(
        self, directory: Path, description: Description, texts_per_file: int = _TEXTS_PER_FILE
    ) -> None:
        """As a `LineWriter`."""
        super().__init__(directory, _layout(texts_per_file), description)

    def write(self, text: DistilledText) -> None:
        fields = asdict(text)
        if not text.text:
            del fields["text"]
        self.append(fields)


def _layout(texts_per_file: int) -> Layout:
    return Layout("distill.json", "texts", "outrider distill", texts_per_file)


def _text_of(fields: Mapping[str, Any]) -> DistilledText:
    return DistilledText(
        id=fields["id"],
        prompt_tokens=tuple(fields["prompt_tokens"]),
        output_tokens=tuple(fields["output_tokens"]),
        temperature=fields["temperature"],
        template=fields["template"],
        source=fields["source"],
        finish_reason=fields["finish_reason"],
        text=fields.get("text", ""),
    )
