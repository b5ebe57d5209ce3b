"""Texts that the target wrote, as files: what `outrider distill` writes and trainers read.

A directory holds `distill.json`, which says what wrote the texts, and `texts-00000.jsonl`, `texts-00001.jsonl`, …,
one text per line. Tokens are the truth; text stands beside them only where it was asked for. A text that was dropped
leaves a line in `dropped.jsonl`, so that a run which goes on does not write it again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

FORMAT = 1
WRITTEN = "written"
"""`DistilledText.source` of prompts that the target wrote itself."""

_DESCRIPTION = "distill.json"
_DROPPED = "dropped.jsonl"
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


@dataclass(frozen=True)
class Description:
    """What wrote a directory's texts.

    Attributes:
        model: `target.model` of the run.
        vocab_size: of the target.
        tokenizer: SHA-256 of the tokenizer's JSON, hexadecimal.
        settings: what decides what each text is; a run that goes on must have the same.
        outrider: version that began the run.
    """

    model: str
    vocab_size: int
    tokenizer: str
    settings: Mapping[str, Any]
    outrider: str

    def difference(self, other: Description) -> str:
        """The first field in which a run that goes on differs from this one, for an error; empty: none."""
        for field in ("model", "vocab_size", "tokenizer"):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return f"{field} must be {ours!r}, got {theirs!r}"
        for field in dict.fromkeys([*self.settings, *other.settings]):
            ours, theirs = self.settings.get(field), other.settings.get(field)
            if ours != theirs:
                return f"{field} must be {json.dumps(ours)}, got {json.dumps(theirs)}"
        return ""


def load_description(directory: Path) -> Description:
    """Raises ValueError where there is none, or one of another format."""
    path = directory / _DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"{directory} must be a directory that `outrider distill` wrote: it has no {_DESCRIPTION}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT}, got {fields['format']!r}")
        names = ("model", "vocab_size", "tokenizer", "settings", "outrider")
        return Description(**{name: fields[name] for name in names})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def read_texts(directory: Path) -> Iterator[DistilledText]:
    """All texts, in the order in which they were written; of a run that is under way those that are whole.

    Raises ValueError naming file and line of what is no text.
    """
    for path in _files(directory):
        for number, fields in _objects(path):
            try:
                yield _text_of(fields)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no text of format {FORMAT} ({error!r})") from error


def read_dropped(directory: Path) -> dict[str, str]:
    """Why texts were dropped, by id."""
    path = directory / _DROPPED
    return {fields["id"]: fields["reason"] for _, fields in _objects(path)} if path.exists() else {}


class TextWriter:
    """Appends texts to a directory; what was handed over is in the file when the call returns.

    Use as a context manager. One writer at a time has a directory: a second one is refused.
    """

    def __init__(
        self, directory: Path, description: Description, texts_per_file: int = _TEXTS_PER_FILE
    ) -> None:
        """Begins a directory, or goes on with one after a run that ended anywhere.

        Raises:
            ValueError: another run writes there, or it was begun with other settings.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._texts_per_file = texts_per_file
        self._directory_fd = os.open(directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"--out must be a directory that no other run writes to, got {directory}"
                ) from error
            self._describe(description)
            files = _files(directory)
            for path in [*files, directory / _DROPPED]:
                _cut_unfinished_line(path)
        except BaseException:
            os.close(self._directory_fd)
            raise
        self._number = max(0, len(files) - 1)
        self._num_in_file = sum(1 for _ in _objects(files[-1])) if files else 0
        self._file = self._open(self._number)
        self._dropped = (directory / _DROPPED).open("a", encoding="utf-8")

    def write(self, text: DistilledText) -> None:
        if self._num_in_file >= self._texts_per_file:
            self._file.close()
            self._number, self._num_in_file = self._number + 1, 0
            self._file = self._open(self._number)
        fields = asdict(text)
        if not text.text:
            del fields["text"]
        self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")
        self._file.flush()
        self._num_in_file += 1

    def drop(self, text_id: str, reason: str) -> None:
        """Notes that there will be no such text."""
        self._dropped.write(json.dumps({"id": text_id, "reason": reason}) + "\n")
        self._dropped.flush()

    def close(self) -> None:
        self._file.close()
        self._dropped.close()
        os.close(self._directory_fd)

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, number: int) -> Any:
        return (self._directory / f"texts-{number:05d}.jsonl").open("a", encoding="utf-8")

    def _describe(self, description: Description) -> None:
        path = self._directory / _DESCRIPTION
        if path.exists():
            difference = load_description(self._directory).difference(description)
            if difference:
                raise ValueError(f"{self._directory} was begun with other settings: {difference}")
            return
        if _files(self._directory):
            raise ValueError(
                f"--out must be an empty directory or one with {_DESCRIPTION}, got {self._directory}"
            )
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"format": FORMAT, **asdict(description)}, indent=2) + "\n")
        unfinished.replace(path)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("texts-*.jsonl"))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each whole line. A last line without its end is one that a run was cut off in."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{path}, line {number}: must be an object, got {fields!r}")
            yield number, fields


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


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 4096)
            file.seek(begin)
            block = file.read(end - begin)
            at = block.rfind(b"\n")
            if at >= 0:
                end = begin + at + 1
                break
            end = begin
        file.truncate(end)
