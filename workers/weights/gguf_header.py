"""Header of a GGUF file: metadata and the table of tensors.

`gguf.GGUFReader` makes two numpy arrays per vocabulary entry (7 s and 500 MB for a 152k vocabulary), so the
header is read here; block layouts, type numbers and dequantisation come from the gguf package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

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


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in torch order (rows first; GGUF itself lists the row length first)."""

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
    """Metadata (arrays are lists) and the tensors by their GGUF names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header. Raises ValueError when the file is not GGUF version 2 or 3 or ends too early."""
    with path.open("rb") as file:
        try:
            return _read(path, file)
        except (struct.error, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a complete GGUF file: {error}") from error


def _read(path: Path, file: BufferedReader) -> GgufHeader:
    if file.read(4) != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file")
    version, num_tensors, num_keys = struct.unpack("<IQQ", _take(file, 20))
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}; supported: 2, 3 (little endian)")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = _string(file)
        metadata[key] = _value(file, _kind(path, file))
    infos = []
    for _ in range(num_tensors):
        name = _string(file)
        (num_dims,) = struct.unpack("<I", _take(file, 4))
        dims = struct.unpack(f"<{num_dims}Q", _take(file, 8 * num_dims))
        type_number, offset = struct.unpack("<IQ", _take(file, 12))
        infos.append((name, tuple(reversed(dims)), type_number, offset))
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    data_start = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, type_number, offset in infos:
        try:
            tensor_type = GGMLQuantizationType(type_number)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {name} has unknown type {type_number}") from error
        tensors[name] = GgufTensor(name, shape, tensor_type, data_start + offset)
    return GgufHeader(path, metadata, tensors)


def _take(file: BufferedReader, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError("it ends inside the header")
    return data


def _string(file: BufferedReader) -> str:
    (length,) = struct.unpack("<Q", _take(file, 8))
    return _take(file, length).decode()


def _kind(path: Path, file: BufferedReader) -> GGUFValueType:
    (number,) = struct.unpack("<I", _take(file, 4))
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise ValueError(f"{path} has metadata of unknown type {number}") from error


def _value(file: BufferedReader, kind: GGUFValueType) -> Any:
    if kind is GGUFValueType.STRING:
        return _string(file)
    if kind is GGUFValueType.ARRAY:
        number, count = struct.unpack("<IQ", _take(file, 12))
        item = GGUFValueType(number)
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            return np.frombuffer(_take(file, count * dtype.itemsize), dtype).tolist()
        return [_value(file, item) for _ in range(count)]
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(_take(file, dtype.itemsize), dtype)[0].item()
