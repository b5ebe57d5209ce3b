"""A directory that one run at a time fills with JSON objects, a line each, and goes on with after it ended anywhere.

It holds a description (what wrote it, `distill.json` or another name), `PREFIX-00000.jsonl`, `PREFIX-00001.jsonl`, …,
and `dropped.jsonl`: what will not be there and why, so that a run which goes on does not try it again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FORMAT = 1
DROPPED = "dropped.jsonl"


@dataclass(frozen=True)
class Layout:
    """How a directory of some kind is laid out.

    Attributes:
        description: name of the file that says what wrote it.
        prefix: of the files with its lines.
        command: that writes such directories, for messages.
        lines_per_file: most of one file.
    """

    description: str
    prefix: str
    command: str
    lines_per_file: int = 20_000

    def files(self, directory: Path) -> list[Path]:
        return sorted(directory.glob(f"{self.prefix}-*.jsonl"))


@dataclass(frozen=True)
class Description:
    """What wrote a directory's lines.

    Attributes:
        model: `target.model` of the run.
        vocab_size: of the target.
        tokenizer: SHA-256 of the tokenizer's JSON, hexadecimal.
        settings: what decides what each line is; a run that goes on must have the same.
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


def read_description(directory: Path, layout: Layout) -> Description:
    """Raises ValueError where there is none, or one of another format."""
    path = directory / layout.description
    if not path.is_file():
        raise ValueError(
            f"{directory} must be a directory that `{layout.command}` wrote: it has no {layout.description}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT}, got {fields['format']!r}")
        names = ("model", "vocab_size", "tokenizer", "settings", "outrider")
        return Description(**{name: fields[name] for name in names})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


class LineWriter:
    """Appends objects to a directory; what was handed over is in the file when the call returns.

    Use as a context manager. One writer at a time has a directory: a second one is refused.
    """

    def __init__(self, directory: Path, layout: Layout, description: Description) -> None:
        """Begins a directory, or goes on with one after a run that ended anywhere.

        Raises:
            ValueError: another run writes there, or it was begun with other settings.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._layout = layout
        self._directory_fd = os.open(directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"--out must be a directory that no other run writes to, got {directory}"
                ) from error
            self._describe(description)
            files = layout.files(directory)
            for path in [*files, directory / DROPPED]:
                _cut_unfinished_line(path)
        except BaseException:
            os.close(self._directory_fd)
            raise
        self._number = max(0, len(files) - 1)
        self._num_in_file = sum(1 for _ in read_objects(files[-1])) if files else 0
        self._file = self._open(self._number)
        self._dropped = (directory / DROPPED).open("a", encoding="utf-8")

    def append(self, fields: Mapping[str, Any]) -> None:
        if self._num_in_file >= self._layout.lines_per_file:
            self._file.close()
            self._number, self._num_in_file = self._number + 1, 0
            self._file = self._open(self._number)
        self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")
        self._file.flush()
        self._num_in_file += 1

    def drop(self, line_id: str, reason: str) -> None:
        """Notes that there will be no such line."""
        self._dropped.write(json.dumps({"id": line_id, "reason": reason}) + "\n")
        self._dropped.flush()

    def close(self) -> None:
        self._file.close()
        self._dropped.close()
        os.close(self._directory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, number: int) -> Any:
        return (self._directory / f"{self._layout.prefix}-{number:05d}.jsonl").open("a", encoding="utf-8")

    def _describe(self, description: Description) -> None:
        path = self._directory / self._layout.description
        if path.exists():
            difference = read_description(self._directory, self._layout).difference(description)
            if difference:
                raise ValueError(f"{self._directory} was begun with other settings: {difference}")
            return
        if self._layout.files(self._directory):
            raise ValueError(
                f"--out must be an empty directory or one with {path.name}, got {self._directory}"
            )
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"format": FORMAT, **asdict(description)}, indent=2) + "\n")
        unfinished.replace(path)


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def read_dropped(directory: Path) -> dict[str, str]:
    """Why lines were dropped, by id."""
    path = directory / DROPPED
    return {fields["id"]: fields["reason"] for _, fields in read_objects(path)} if path.exists() else {}


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
