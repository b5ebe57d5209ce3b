"""The target's rows of texts in files, computed once for all methods and heads that read them.

safetensors files, each of one kind of row and 256 texts, named by a hash of all that decides what is in it: a run
that goes on, and one of any method with the same target and texts, finds what it shares with earlier ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from outrider.workers.training.computed_rows import FeatureComputer
from outrider.workers.training.data import TrainingText
from outrider.workers.training.feature_batch import LAST, FeatureBatch, WantedRows, joined
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.safetensors_writer import write_tensors

_TEXTS_PER_FILE = 256


class FeatureFiles:
    """The rows of some texts in files: of each 256 texts one file for each of `WantedRows.names`."""

    def __init__(self, texts: Sequence[TrainingText], wanted: WantedRows, folder: Path, target: str) -> None:
        """target: what besides texts and layer decides the rows of a layer: model and number format."""
        self._texts = texts
        self._wanted = wanted
        self._files = {name: row_files(texts, folder, f"{target} {name}") for name in {*wanted.names, LAST}}

    @property
    def num_missing(self) -> int:
        """Tokens of which not everything is kept."""
        return sum(len(text.tokens) for number in self._missing() for text in self._group(number))

    def keep(self, computer: FeatureComputer, progress: Progress) -> None:
        """Computes what is not in its file yet; `progress` is told how many texts are there."""
        for number, names in self._missing().items():
            progress("features of texts", number * _TEXTS_PER_FILE, len(self._texts))
            last = self._files[LAST][number]
            if names == [self._wanted.law_name] and last.exists():
                # Another head than that of an earlier run: the layers need not be run again.
                computed = {names[0]: computer.law(load_file(last)["normed"])}
            else:
                computed = computer.compute(self._group(number))
            for name, tensors in computed.items():
                if not self._files[name][number].exists():
                    _write(self._files[name][number], tensors)
        progress("features of texts", len(self._texts), len(self._texts))

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        texts = [self._texts[index] for index in indices]
        return joined(texts, self._wanted, [self._rows(index) for index in indices])

    def _missing(self) -> dict[int, list[str]]:
        missing: dict[int, list[str]] = {}
        for name in self._wanted.names:
            for number, path in enumerate(self._files[name]):
                if not path.exists():
                    missing.setdefault(number, []).append(name)
        return dict(sorted(missing.items()))

    def _group(self, number: int) -> Sequence[TrainingText]:
        return self._texts[number * _TEXTS_PER_FILE : (number + 1) * _TEXTS_PER_FILE]

    def _rows(self, index: int) -> dict[str, dict[str, Tensor]]:
        number, place = divmod(index, _TEXTS_PER_FILE)
        lengths = [len(text.tokens) for text in self._group(number)[: place + 1]]
        rows = slice(sum(lengths[:-1]), sum(lengths))
        found = {}
        for name in self._wanted.names:
            with safe_open(self._files[name][number], framework="pt") as file:
                found[name] = {key: file.get_slice(key)[rows] for key in file.keys()}  # noqa: SIM118
        return found


class Digested(Protocol):
    """A text, or several, that rows are computed of."""

    def digested(self) -> bytes:
        """What of it decides the target's rows."""
        ...


Text = TypeVar("Text", bound=Digested)
AnyText = TypeVar("AnyText", contravariant=True)


class RowComputer(Protocol[AnyText]):
    """Computes what is kept."""

    def compute(self, texts: Sequence[AnyText]) -> list[dict[str, Tensor]]:
        """Of each text its tensors by name, equally long ones each."""
        ...


def row_files(
    texts: Sequence[Digested], folder: Path, identity: str, texts_per_file: int = _TEXTS_PER_FILE
) -> list[Path]:
    """Where the rows of these texts are kept, a file for each `texts_per_file` of them.

    Args:
        identity: what else than texts decides the rows: target, layers, number format, ids.
    """
    starts = range(0, len(texts), texts_per_file)
    parts = [texts[start : start + texts_per_file] for start in starts]
    return [folder / f"{_digest(identity, part)}.safetensors" for part in parts]


def keep_rows(
    texts: Sequence[Text],
    files: Sequence[Path],
    computer: RowComputer[Text],
    progress: Progress,
    texts_per_file: int = _TEXTS_PER_FILE,
) -> None:
    """Computes what is not in its file yet; `progress` is told how many texts are there."""
    for number, path in enumerate(files):
        start = number * texts_per_file
        if not path.exists():
            progress("features of texts", start, len(texts))
            by_text = computer.compute(texts[start : start + texts_per_file])
            _write(path, {name: torch.cat([tensors[name] for tensors in by_text]) for name in by_text[0]})
    progress("features of texts", len(texts), len(texts))


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {})


def _digest(identity: str, texts: Sequence[Digested]) -> str:
    digest = hashlib.sha256(identity.encode())
    for text in texts:
        digest.update(text.digested())
    return digest.hexdigest()[:32]
