"""Safetensors checkpoints: one file, or several with an index.

The format (8 bytes of header length, a JSON header, raw row-major data) is read here directly, not mapped:
each rank reads the byte ranges of its own slices, and nothing that was read stays resident.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from outrider.workers.weights.config import ModelConfig, model_config_from_hf
from outrider.workers.weights.source import CHUNK_ELEMENTS, DataFile, bounds, read_rectangle, unknown_tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class _Entry:
    file: DataFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsSource:
    """A directory with config.json and model.safetensors, or model.safetensors.index.json and its shards."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._config = read_hf_config(directory)
        self._entries: dict[str, _Entry] = {}
        for path in _weight_files(directory):
            self._entries.update(_read_header(path))
        if self._config.tied_embeddings:
            # Some exporters write the tied head a second time; the embedding is the one that counts.
            self._entries.pop("lm_head.weight", None)

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

    Raises ValueError when config.json is missing or is not JSON, or describes a model that is not supported.
    """
    config = model_config_from_hf(_read_json(directory / "config.json"))
    generation = directory / "generation_config.json"
    if not generation.exists():
        return config
    eos = _read_json(generation).get("eos_token_id")
    extra = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
    elif (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
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
        header: dict[str, Any] = json.loads(header_bytes)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name} has dtype {info['dtype']}; supported: {', '.join(_DTYPES)}"
            )
        start, stop = info["data_offsets"]
        entry = _Entry(file, 8 + length + start, _DTYPES[info["dtype"]], tuple(info["shape"]))
        if stop - start != math.prod(entry.shape) * entry.dtype.itemsize:
            raise ValueError(f"{path}: tensor {name} has {stop - start} bytes, which do not fit its shape")
        file.require(8 + length + stop)
        entries[name] = entry
    return entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return data
