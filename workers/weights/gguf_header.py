"""Header of a GGUF file, or of one that was split into parts: metadata and the table of tensors.

`gguf.GGUFReader` makes two numpy arrays per vocabulary entry (7 s and 500 MB for a 152k vocabulary), so the
header is read here; block layouts, type numbers and dequantisation come from the gguf package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from outrider.workers.weights.fields import Fields

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}

_MAGIC = b"GGUF"
_LENGTH = struct.Struct("<Q")
_NUMBER = struct.Struct("<I")
_KIND_AND_COUNT = struct.Struct("<IQ")
_COUNTS = struct.Struct("<IQQ")  # version, tensors, keys
_MAX_DIMS = 4
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in torch order (rows first; GGUF itself lists the row length first)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (arrays are lists) and the tensors by their GGUF names, of all parts of a split file.

    `path` is the first part.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def first_part(path: Path) -> Path:
    """The first part of the split file that `path` is named as a part of; `path` itself for other names."""
    match = _PART_NAME.fullmatch(path.name)
    return path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else path


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header; for any part of a split file those of all parts, as llama.cpp's `gguf-split` makes them.

    Raises ValueError when the file is not GGUF version 2 or 3, ends too early, or lacks a part.
    """
    header = _read_file(path)
    num_parts = header.metadata.get("split.count", 0)
    if num_parts in (0, 1):
        return header
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != num_parts:
        raise ValueError(
            f"{path} is one of {num_parts} parts, so it must be named NAME-0000N-of-{num_parts:05}.gguf"
        )
    paths = [path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf") for i in range(num_parts)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} of {num_parts} parts missing)")
    tensors: dict[str, GgufTensor] = {}
    parts = [_read_file(part) for part in paths]
    for number, part in enumerate(parts):
        told = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if told != (number, num_parts):
            raise ValueError(
                f"{part.path} says that it is part {told[0]} of {told[1]}, not what its name says"
            )
        if tensors.keys() & part.tensors.keys():
            raise ValueError(
                f"{part.path}: tensor {min(tensors.keys() & part.tensors.keys())} is there twice"
            )
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ValueError(f"{path}: the {num_parts} parts have {len(tensors)} of {total} tensors")
    return GgufHeader(paths[0], parts[0].metadata, tensors)


def _read_file(path: Path) -> GgufHeader:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < len(_MAGIC):  # an empty file cannot be mapped
            raise ValueError(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(path, _Bytes(data))
            except (struct.error, EOFError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not a complete GGUF file: {error}") from error


class _Bytes:
    """What comes next in a mapped file. Lengths are not trusted: one that leads beyond the end is an EOFError."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.at + count
        if end > len(self._data):
            raise EOFError("it ends inside the header")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def numbers(self, form: struct.Struct) -> tuple[Any, ...]:
        """The next numbers, as `form` has them."""
        return form.unpack(self.take(form.size))

    def text(self) -> str:
        """The next text, behind its length."""
        (length,) = self.numbers(_LENGTH)
        return self.take(length).decode()

    def texts(self, count: int) -> list[str]:
        """As many calls of `text`: vocabularies and merges are hundreds of thousands, in one loop without calls of
        our own."""
        data, at, num_bytes = self._data, self.at, len(self._data)
        found = []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            start, at = at + _LENGTH.size, at + _LENGTH.size + length
            if at > num_bytes:
                raise EOFError("it ends inside the header")
            found.append(data[start:at].decode())
        self.at = at
        return found


def _read(path: Path, file: _Bytes) -> GgufHeader:
    if file.take(len(_MAGIC)) != _MAGIC:
        raise ValueError(f"{path} is not a GGUF file")
    version, num_tensors, num_keys = file.numbers(_COUNTS)
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}; supported: 2, 3 (little endian)")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = file.text()
        if key in metadata:
            raise ValueError(f"{path}: the metadata key {key} is there twice")
        metadata[key] = _value(file, _kind(path, file))
    infos = []
    for _ in range(num_tensors):
        name = file.text()
        (num_dims,) = file.numbers(_NUMBER)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"{path}: tensor {name} has {num_dims} dimensions, not 1 to {_MAX_DIMS}")
        dims = file.numbers(struct.Struct(f"<{num_dims}Q"))
        type_number, offset = file.numbers(_KIND_AND_COUNT)
        infos.append((name, tuple(reversed(dims)), type_number, offset))
    fields = Fields(metadata, f"{path}: ")
    alignment = GGUF_DEFAULT_ALIGNMENT
    if fields.has("general.alignment"):
        alignment = fields.integer("general.alignment")
    data_start = -(-file.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_number, offset in infos:
        try:
            tensor_type = GGMLQuantizationType(type_number)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {name} has unknown type {type_number}") from error
        if shape[-1] % GGML_QUANT_SIZES[tensor_type][0]:
            raise ValueError(
                f"{path}: tensor {name} has rows of {shape[-1]}, not whole {tensor_type.name} blocks"
            )
        if name in tensors:
            raise ValueError(f"{path}: tensor {name} is there twice")
        tensors[name] = GgufTensor(path, name, shape, tensor_type, data_start + offset)
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise ValueError(f"{path}: tensor {tensor.name} begins inside the one before it")
        end = tensor.offset + tensor.num_bytes
    return GgufHeader(path, metadata, tensors)


def _kind(path: Path, file: _Bytes) -> GGUFValueType:
    (number,) = file.numbers(_NUMBER)
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise ValueError(f"{path} has metadata of unknown type {number}") from error


def _value(file: _Bytes, kind: GGUFValueType) -> Any:
    if kind is GGUFValueType.STRING:
        return file.text()
    if kind is GGUFValueType.ARRAY:
        number, count = file.numbers(_KIND_AND_COUNT)
        item = GGUFValueType(number)
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            return np.frombuffer(file.take(count * dtype.itemsize), dtype).tolist()
        return (
            file.texts(count) if item is GGUFValueType.STRING else [_value(file, item) for _ in range(count)]
        )
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(file.take(dtype.itemsize), dtype)[0].item()
