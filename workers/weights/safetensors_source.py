"""Safetensors checkpoints: a directory with config.json and one file, or several with an index."""

import math
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fields import Fields, read_json
from outrider.workers.weights.hf_config import model_config_from_hf
from outrider.workers.weights.safetensors_files import (
    Entry,
    SafetensorsFiles,
    check_index,
    weight_files,
)
from outrider.workers.weights.source import CHUNK_ELEMENTS, Stored, bounds, unknown_tensor
from outrider.workers.weights.tensors import (
    EMBEDDING,
    HEAD,
    FoundTensor,
    check_tensors,
    is_harmless,
    tensor_shapes,
)

# Types whose values mean themselves.
_READABLE = ("F64", "F32", "F16", "BF16")


class SafetensorsSource:
    """A directory with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Opening it reads the headers and compares the tensors with the configuration: see `check_tensors`.
    """

    def __init__(self, directory: Path, names: Collection[str] = ()) -> None:
        """`names`: the tensors that are wanted, so that files without them may be missing; none: the whole model."""
        self.directory = directory
        self._config = read_hf_config(directory)
        self._files = SafetensorsFiles(weight_files(directory, names_to_fetch(directory, names)))
        check_index(directory, self._files.entries)
        found = {name for name in self._files.entries if not is_harmless(name)}
        tied = self._config.tied_embeddings
        expected = tensor_shapes(replace(self._config, tied_embeddings=tied and HEAD not in found))
        # Names in the files by the names that they are asked for.
        self._stored_as = {name: name for name in found if not names or name in names}
        if tied and HEAD in names and HEAD not in found and EMBEDDING in found:
            self._stored_as[HEAD] = EMBEDDING
            expected[HEAD] = expected[EMBEDDING]
        if tied and not names and EMBEDDING not in found and HEAD in found:
            self._stored_as[EMBEDDING] = self._stored_as.pop(HEAD)
            del expected[HEAD]
        try:
            check_tensors(
                self._config.architecture,
                {name: shape for name, shape in expected.items() if not names or name in names},
                {name: self._found(stored) for name, stored in self._stored_as.items()},
            )
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        if tied and not names and HEAD in self._stored_as:
            self._settle_tied_head()

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return set(self._stored_as)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        entry = self._entry(name)
        start, stop = bounds(rows, entry.shape[0])
        left, right = bounds(columns, entry.shape[1]) if len(entry.shape) > 1 else (0, 1)
        out = torch.empty(stop - start, right - left, dtype=dtype)
        self.read_into(name, slice(start, stop), slice(left, right), out)
        return out if len(entry.shape) > 1 else out[:, 0]

    def read_into(self, name: str, rows: slice, columns: slice, out: torch.Tensor) -> None:
        entry, stored_as = self._entry(name), self._stored_as[name]
        start, stop = bounds(rows, entry.shape[0])
        span = bounds(columns, entry.shape[1]) if len(entry.shape) > 1 else (0, 1)
        out = out.view(stop - start, span[1] - span[0])
        if entry.dtype == out.dtype:
            self._files.read_into(stored_as, (start, stop), span, out)
            return

        def read(first: int, last: int) -> None:
            out[first:last] = self._files.read_stored(stored_as, (start + first, start + last), span).data

        self._files.reader.each(stop - start, max(1, CHUNK_ELEMENTS // max(1, out.shape[1])), read)

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        num_rows, num_columns = self._entry(name).shape
        return self._files.read_stored(
            self._stored_as[name], bounds(rows, num_rows), bounds(columns, num_columns)
        )

    def read_rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        entry = self._entry(name)
        num_rows, num_columns = entry.shape
        row_bytes = num_columns * entry.dtype.itemsize
        stored = torch.empty(len(ids), num_columns, dtype=entry.dtype)
        view = stored.view(torch.uint8).numpy().reshape(-1).data
        for i, row in enumerate(ids.tolist()):
            assert 0 <= row < num_rows, (name, row)
            entry.file.read_into(view[i * row_bytes : (i + 1) * row_bytes], entry.offset + row * row_bytes)
        return stored.to(dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(math.prod(self.shape(name)) for name in self._stored_as) * dtype.itemsize

    def _entry(self, name: str) -> Entry:
        if name not in self._stored_as:
            raise unknown_tensor(name, self.directory)
        return self._files.entries[self._stored_as[name]]

    def _found(self, stored: str) -> FoundTensor:
        entry = self._files.entries[stored]
        return FoundTensor(stored, entry.shape, entry.format, entry.format in _READABLE)

    def _settle_tied_head(self) -> None:
        """A second copy of the embedding is left out; a head of its own counts, as in transformers 5."""
        if self._are_equal(HEAD, EMBEDDING):
            del self._stored_as[HEAD]
            return
        self._config = replace(self._config, tied_embeddings=False)
        warnings.warn(
            f"{self.directory}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; "
            f"{HEAD} is used",
            stacklevel=2,
        )

    def _are_equal(self, one: str, other: str) -> bool:
        rows, columns = self.shape(one)
        step = max(1, CHUNK_ELEMENTS // columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            if not torch.equal(*(self.read(x, part, slice(None), torch.float32) for x in (one, other))):
                return False
        return True


def names_to_fetch(directory: Path, names: Collection[str]) -> Collection[str]:
    """The tensors in whose files some tensors are: a tied head is in the embedding, if it is nowhere else."""
    return {*names, EMBEDDING} if HEAD in names and read_hf_config(directory).tied_embeddings else names


def read_hf_config(directory: Path) -> ModelConfig:
    """ModelConfig from config.json, with the end-of-sequence ids of generation_config.json added.

    Needs no weights. Raises ValueError when config.json is missing or is not JSON, or describes a model that is
    not supported.
    """
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} holds an adapter (adapter_config.json); merge it into its model first")
    path = directory / "config.json"
    raw = read_json(path)
    try:
        config = model_config_from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    extra = generation_end_ids(directory, config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


def generation_end_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids that a generation_config.json names, () without one; ValueError for what is no id."""
    path = directory / "generation_config.json"
    if not path.exists():
        return ()
    return Fields(read_json(path), f"{path}: ").token_ids("eos_token_id", vocab_size)
