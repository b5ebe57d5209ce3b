"""Where weights come from: one protocol for safetensors directories, GGUF files and random models.

Tensors are named as Hugging Face names them (`model.layers.0.self_attn.q_proj.weight`) and oriented as torch
keeps them: `[out_features, in_features]`. A reader asks for the rows and columns it owns and gets a copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.data_file import DataFile
from outrider.workers.weights.quantization import format_of
from outrider.workers.weights.scaled import ScaledMatrix
from outrider.workers.weights.tensors import EMBEDDING, HEAD

# Elements read and converted at a time: little memory beside the matrix, and intermediates stay in cache
# (dequantising Q4_K/Q5_0/Q6_K: 231 M elements/s against 144 M with 4 M elements at a time).
CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Stored:
    """A part of a matrix as its file keeps it.

    Attributes:
        data: [rows, columns] in the file's own dtype, or the quantisation blocks of GGUF as u8 [rows, bytes].
        format: how the file names that, e.g. "BF16", "F8_E4M3", "Q4_K".
        scales: what belongs to the part of the tensors beside the matrix without which its values mean nothing, each
            of two dimensions, by the ends of their names ("weight_scale"); empty where the values mean themselves.
    """

    data: torch.Tensor
    format: str
    scales: Mapping[str, torch.Tensor]


class WeightSource(Protocol):
    """Reads one checkpoint. Implementations keep descriptors, not mappings, so reading does not grow RSS."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model and its end-of-sequence ids."""
        ...

    def names(self) -> set[str]:
        """Hugging Face names of all tensors. Without `lm_head.weight` the embedding serves as the head."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor. Raises ValueError for a name that is not in `names()`."""
        ...

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        """Copy of `tensor[rows, columns]` in `dtype`; a 1-D tensor is sliced by `rows` alone.

        Only the bytes of the covered rows (and, within them, of the covered columns, to whole quantisation
        blocks) are read from the file. Slices have step 1. Raises ValueError for an unknown name.
        """
        ...

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        """`matrix[rows, columns]` without conversion, and its scales: for who computes with it as it is stored."""
        ...

    def read_rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` (i64 [n]) of a 2-D tensor -> [n, columns] in `dtype`; for embeddings of a few tokens."""
        ...

    def total_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that all tensors take once loaded in `dtype`."""
        ...


def head_name(source: WeightSource) -> str:
    """The tensor that is a model's LM head: its own, whatever its configuration says, or the embedding."""
    return HEAD if HEAD in source.names() else EMBEDDING


def read_scaled(source: WeightSource, name: str, rows: slice, columns: slice) -> ScaledMatrix | None:
    """`matrix[rows, columns]` as narrow numbers with their scales; None where it is not stored so."""
    form = format_of(source.config.quantization, name)
    if form is None:
        return None
    num_rows, num_columns = source.shape(name)
    stored = source.read_stored(name, rows, columns)
    values, *_ = form.tensors(num_rows, num_columns)
    return form.scaled(
        {values: stored.data, **stored.scales}, bounds(rows, num_rows), bounds(columns, num_columns)
    )


@runtime_checkable
class ReadsInto(Protocol):
    """A source that can read straight into memory that is there."""

    def read_into(self, name: str, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """As `WeightSource.read`, into `out`, [rows, columns] or [rows], in the dtype of `out`."""
        ...


def read_into(source: WeightSource, name: str, rows: slice, columns: slice, out: torch.Tensor) -> None:
    """`source.read` into `out`, without a copy between where the source can."""
    if isinstance(source, ReadsInto) and out.is_contiguous() and out.device.type == "cpu":
        source.read_into(name, rows, columns, out)
    else:
        out.copy_(source.read(name, rows, columns, out.dtype))


def read_rectangle(
    file: DataFile,
    offset: int,
    row_bytes: int,
    rows: tuple[int, int],
    window: tuple[int, int],
    out: torch.Tensor,
) -> None:
    """Reads bytes `window` of each of the rows `rows` of a matrix that lies row by row at `offset`.

    `out` is u8 [num_rows, window_bytes], contiguous. One call for whole rows, one per row for a part of each.
    """
    start, stop = rows
    left, right = window
    view = out.numpy().reshape(-1).data
    if right - left == row_bytes:
        file.read_into(view, offset + start * row_bytes)
        return
    width = right - left
    for i in range(stop - start):
        file.read_into(view[i * width : (i + 1) * width], offset + (start + i) * row_bytes + left)


def bounds(part: slice, size: int) -> tuple[int, int]:
    """(start, stop) of a step-1 slice of an axis of length `size`."""
    start, stop, step = part.indices(size)
    assert step == 1, part
    return start, max(start, stop)


def unknown_tensor(name: str, path: Path) -> ValueError:
    return ValueError(f"{path} has no tensor {name}")
