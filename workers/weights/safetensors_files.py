"""The files of a safetensors checkpoint: which there are, what is in them, and parts of it as it is stored.

The format (8 bytes of header length, a JSON header, raw row-major data) is read here directly, not mapped:
each rank reads the byte ranges of its own slices, and nothing that was read stays resident.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outrider.workers.weights.data_file import DataFile
from outrider.workers.weights.fields import Fields, read_json
from outrider.workers.weights.hf_directory import INDEX, SINGLE
from outrider.workers.weights.reader import Reader

DTYPES = {
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
class Entry:
    """Where a tensor lies, and how the file names its type."""

    file: DataFile
    offset: int
    num_bytes: int
    format: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.format]


class SafetensorsFiles:
    """The tensors of several files by name; says nothing of what they mean.

    Raises ValueError, one line, for damaged files and a tensor that is in two of them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self.reader = Reader()
        for path in paths:
            for name, entry in _read_header(path).items():
                if name in self.entries:
                    raise ValueError(f"tensor {name} is in {self.entries[name].file.path} and in {path}")
                self.entries[name] = entry

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """Rows and columns of a matrix as they are stored; a vector is one column, and a number one of one row."""
        entry = self.entries[name]
        data = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=entry.dtype)
        self.read_into(name, rows, columns, data)
        return data

    def read_into(
        self, name: str, rows: tuple[int, int], columns: tuple[int, int], out: torch.Tensor
    ) -> None:
        """As `read`, into `out` [rows, columns], contiguous and of the dtype that is stored."""
        entry = self.entries[name]
        size = entry.dtype.itemsize
        assert out.dtype == entry.dtype, (name, out.dtype, entry.dtype)
        row_bytes = math.prod(entry.shape[1:]) * size
        window = (columns[0] * size, columns[1] * size)
        self.reader.rectangle(entry.file, entry.offset, row_bytes, rows, window, out.view(torch.uint8))


def check_index(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Raises ValueError where a file that was opened lacks a tensor that the index says is in it."""
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        return
    opened = {entry.file.path.name for entry in entries.values()}
    weight_map = Fields(read_json(directory / INDEX), f"{directory / INDEX}: ").object("weight_map")
    for name, file in weight_map.items():
        if file in opened and name not in entries:
            raise ValueError(f"{directory / file} lacks tensor {name}, which {INDEX} says is in it")


def _read_header(path: Path) -> dict[str, Entry]:
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict) or not all(isinstance(info, dict) for info in header.values()):
        raise ValueError(f"{path} is not a safetensors file: its header must hold an object for each tensor")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, info, 8 + length) for name, info in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise ValueError(f"{path}: tensor {name} does not begin where the one before it ends")
        end += entry.num_bytes
    file.require(end)
    return entries


def _entry(file: DataFile, name: str, info: dict[str, Any], data_start: int) -> Entry:
    fields = Fields(info, f"{file.path}: tensor {name}: ")
    shape, offsets = fields.integers("shape"), fields.integers("data_offsets")
    format_name = fields.string("dtype")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] or min(shape, default=0) < 0:
        raise fields.wrong("data_offsets", "the first byte and the one after the last")
    start, stop = offsets
    entry = Entry(file, data_start + start, stop - start, format_name, tuple(shape))
    # The size of an element of other types does not matter: they are refused by name if they are weights.
    if format_name in DTYPES and stop - start != math.prod(shape) * entry.dtype.itemsize:
        raise ValueError(f"{file.path}: tensor {name} has {stop - start} bytes, which do not fit its shape")
    return entry
