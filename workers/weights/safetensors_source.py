"""Safetensors checkpoints: one file, or several with an index.

The format (8 bytes of header length, a JSON header, raw row-major data) is read here directly, not mapped:
each rank reads the byte ranges of its own slices, and nothing that was read stays resident.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.hf_config import model_config_from_hf
from outrider.workers.weights.source import CHUNK_ELEMENTS, DataFile, bounds, read_rectangle, unknown_tensor
from outrider.workers.weights.tensors import EMBEDDING, HEAD, FoundTensor, check_tensors, is_harmless

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies and how the file names its type."""

    file: DataFile
    offset: int
    format: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.format]


class SafetensorsSource:
    """A directory with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Opening it reads the headers and compares the tensors with the configuration: see `check_tensors`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._config = read_hf_config(directory)
        self._entries = _entries(_weight_files(directory))
        if self._config.tied_embeddings and EMBEDDING not in self._entries and HEAD in self._entries:
            self._entries[EMBEDDING] = self._entries.pop(HEAD)
        is_tied = self._config.tied_embeddings and HEAD not in self._entries
        try:
            check_tensors(replace(self._config, tied_embeddings=is_tied), self._found())
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        if self._config.tied_embeddings and HEAD in self._entries:
            self._settle_tied_head()

    def _found(self) -> dict[str, FoundTensor]:
        return {
            name: FoundTensor(name, entry.shape, entry.format, entry.format in _DTYPES)
            for name, entry in self._entries.items()
        }

    def _settle_tied_head(self) -> None:
        """A second copy of the embedding is left out; a head of its own counts, as in transformers 5."""
        if self._are_equal(HEAD, EMBEDDING):
            self._entries.pop(HEAD)
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
            parts = [
                self.read(name, slice(first, first + step), slice(None), torch.float32)
                for name in (one, other)
            ]
            if not torch.equal(*parts):
                return False
        return True

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        entry = self._entry(name)
        num_rows = entry.shape[0] if entry.shape else 1
        num_columns = math.prod(entry.shape[1:])
        start, stop = bounds(rows, num_rows)
        left, right = bounds(columns, num_columns) if len(entry.shape) > 1 else (0, 1)
        out = torch.empty(stop - start, right - left, dtype=dtype)
        size = entry.dtype.itemsize
        step = max(1, CHUNK_ELEMENTS // max(1, right - left))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            target = out[first - start : last - start]
            stored = target if dtype == entry.dtype else torch.empty(target.shape, dtype=entry.dtype)
            read_rectangle(
                entry.file,
                entry.offset,
                num_columns * size,
                (first, last),
                (left * size, right * size),
                stored.view(torch.uint8),
            )
            if stored is not target:
                target.copy_(stored)
        if len(entry.shape) == 2:
            return out
        return out.reshape(stop - start, *entry.shape[1:]) if entry.shape else out.reshape(())

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
        return sum(math.prod(entry.shape) for entry in self._entries.values()) * dtype.itemsize

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise unknown_tensor(name, self.directory)
        return self._entries[name]


def read_hf_config(directory: Path) -> ModelConfig:
    """ModelConfig from config.json, with the end-of-sequence ids of generation_config.json added.

    Needs no weights. Raises ValueError when config.json is missing or is not JSON, or describes a model that is
    not supported.
    """
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} holds an adapter (adapter_config.json); merge it into its model first")
    path = directory / "config.json"
    try:
        config = model_config_from_hf(_read_json(path))
    except ValueError as error:
        raise ValueError(error if str(error).startswith(str(directory)) else f"{path}: {error}") from error
    extra = generation_end_ids(directory, config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


def generation_end_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids that a generation_config.json names, () without one; ValueError for what is no id."""
    path = directory / "generation_config.json"
    if not path.exists():
        return ()
    return Fields(_read_json(path), f"{path}: ").token_ids("eos_token_id", vocab_size)


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors where there is one, as transformers does; else the shards of the index; else all files."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        weight_map = Fields(_read_json(index), f"{index}: ").object("weight_map")
        values = weight_map.values()
        if not all(isinstance(name, str) and Path(name).name == name for name in values):
            raise ValueError(f"{index}: weight_map must give the name of a file for each tensor")
        names = sorted(set(values))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ValueError(
            f"{directory} lacks {missing[0]} ({len(missing)} of {len(names)} weight files missing)"
        )
    if not names:
        raise ValueError(f"{directory} has no .safetensors file")
    return [directory / name for name in names]


def _entries(paths: list[Path]) -> dict[str, _Entry]:
    """The tensors of all files, harmless ones left out."""
    entries: dict[str, _Entry] = {}
    for path in paths:
        for name, entry in _read_header(path).items():
            if name in entries:
                raise ValueError(f"tensor {name} is in {entries[name].file.path} and in {path}")
            if not is_harmless(name):
                entries[name] = entry
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    file = DataFile(path)
    length_bytes = bytearray(8)
    file.read_into(memoryview(length_bytes), 0)
    (length,) = struct.unpack("<Q", length_bytes)
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"{path} is not a safetensors file: its header would take {length} bytes")
    header_bytes = bytearray(length)
    file.read_into(memoryview(header_bytes), 8)
    try:
        header = json.loads(header_bytes)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict) or not all(isinstance(info, dict) for info in header.values()):
        raise ValueError(f"{path} is not a safetensors file: its header must hold an object for each tensor")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, info, 8 + length) for name, info in header.items()}


def _entry(file: DataFile, name: str, info: dict[str, Any], data_start: int) -> _Entry:
    fields = Fields(info, f"{file.path}: tensor {name}: ")
    shape, offsets = fields.integers("shape"), fields.integers("data_offsets")
    format_name = fields.value("dtype")
    if not isinstance(format_name, str):
        raise fields.wrong("dtype", "a text")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] or min(shape, default=0) < 0:
        raise fields.wrong("data_offsets", "the first byte and the one after the last")
    start, stop = offsets
    entry = _Entry(file, data_start + start, format_name, tuple(shape))
    # The size of an element of other types does not matter: they are refused by name if they are weights.
    if format_name in _DTYPES and stop - start != math.prod(shape) * entry.dtype.itemsize:
        raise ValueError(f"{file.path}: tensor {name} has {stop - start} bytes, which do not fit its shape")
    file.require(data_start + stop)
    return entry


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return data
