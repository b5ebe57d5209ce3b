"""Matrices as integers of 8 or of 4 bits with scales: plain ones rounded when they are read, and GGUF's kept.

Two forms, those that `make_scaled_linear` has products for:

- 8 bits: int8, from -127 to 127, one scale for a row.
- 4 bits: uint8, from 0 to 15, a scale and a shift for each group of 32 columns. Scales and centres, the values of an
  8, are numbers of bfloat16, as torch's product keeps them, so that it computes exactly with what is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from outrider.configs.schema import Weights
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.gguf_source import GgufSource
from outrider.workers.weights.quantization import (
    FormatRule,
    ModuleNames,
    NumberFormat,
    Quantization,
    Span,
    StoredTensor,
    format_of,
)
from outrider.workers.weights.scaled import ScaledMatrix
from outrider.workers.weights.source import (
    CHUNK_ELEMENTS,
    Stored,
    WeightSource,
    bounds,
    head_name,
    read_scaled,
)
from outrider.workers.weights.tensors import HEAD, loaded_bytes

GROUP = 32
CENTRE = 8  # the middle of the integers of 4 bits
_LARGEST = 127
# Types of GGUF that are integers from 0 to 15 in groups of 32 columns.
_FOUR_BITS = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)
_PLAIN = (Kind.F32, Kind.F16, Kind.BF16, Kind.F64)
# A router chooses experts: a choice is not nearly right.
_KEPT_PLAIN = ModuleNames(ending=("mlp.gate",))
_EVERY = ModuleNames(every=True)
_WEIGHT = "weight"


@dataclass(frozen=True)
class IntegerFormat:
    """See `NumberFormat`; `bits` 8 or 4, in the forms that this file begins with."""

    bits: Literal[4, 8]

    def tensors(self, rows: int, columns: int) -> Mapping[str, StoredTensor]:
        found = {
            _WEIGHT: StoredTensor(((rows, columns),), ("I8" if self.bits == 8 else "U8",)),
            "scales": StoredTensor(((rows, self._groups(columns)),), ("F32",)),
        }
        return found if self.bits == 8 else {**found, "shifts": found["scales"]}

    def parts(self, rows: Span, columns: Span) -> Mapping[str, tuple[Span, Span]]:
        groups = (0, 1) if self.bits == 8 else (columns[0] // GROUP, -(-columns[1] // GROUP))
        return dict.fromkeys(self.tensors(1, 1), (rows, groups)) | {_WEIGHT: (rows, columns)}

    def scaled(self, tensors: Mapping[str, Tensor], rows: Span, columns: Span) -> ScaledMatrix:
        values, scales, shifts = tensors[_WEIGHT], tensors["scales"], tensors.get("shifts")
        width = columns[1] - columns[0]
        if shifts is None:
            return ScaledMatrix(values, scales, max(1, width))
        # A part that begins inside a group has a shorter one first: its groups become several of equal width.
        into = columns[0] % GROUP
        fine = math.gcd(GROUP, into)
        kept = slice(into // fine, into // fine + -(-width // fine))
        scales, shifts = (
            part.repeat_interleave(GROUP // fine, dim=1)[:, kept].contiguous() for part in (scales, shifts)
        )
        return ScaledMatrix(values, scales, fine, shifts)

    def loaded_bytes(self, rows: int, columns: int) -> int:
        if self.bits == 8:
            return rows * (columns + 4)
        return rows * (-(-columns // 2) + 4 * self._groups(columns))

    def _groups(self, columns: int) -> int:
        return 1 if self.bits == 8 else -(-columns // GROUP)


def with_weights(source: WeightSource, weights: Weights, role: str) -> WeightSource:
    """The same checkpoint, its matrices in the form that `target.weights` or `draft.weights` asks for.

    Args:
        role: `target` or `draft`, for messages.

    Raises:
        ValueError: it is stored otherwise, and not to be rounded twice; or it is to stay quantised and is not.
    """
    if weights == "auto":
        return source
    stored = source.config.quantization
    if weights == "quantized":
        if stored is not None:
            return source
        quantization = _quantization_of(source)
        if not quantization.rules:
            raise ValueError(
                f"{role}.weights must be auto, int8 or int4, because {role}.model is not quantised; got 'quantized'"
            )
        return IntegerSource(source, quantization)
    if stored is not None:
        raise ValueError(
            f"{role}.weights must be auto, because {role}.model is quantised already ({stored.method}); "
            f"got {weights!r}"
        )
    head = FormatRule(ModuleNames(ending=("lm_head",)), IntegerFormat(8))
    rest = FormatRule(_EVERY, IntegerFormat(8 if weights == "int8" else 4))
    return IntegerSource(source, Quantization(weights, (head, rest), _KEPT_PLAIN))


class IntegerSource:
    """A source of plain values, whose matrices are integers for who reads them with their scales.

    A head that is the embedding is read under its own name, as integers; the embedding stays as it is.
    """

    def __init__(self, inner: WeightSource, quantization: Quantization) -> None:
        """`quantization`: which matrices, all of an `IntegerFormat`."""
        self._inner = inner
        self._config = replace(inner.config, quantization=quantization)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return self._inner.names() | ({HEAD} if self._form(HEAD) else set())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(self._stored_name(name))

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        matrix = read_scaled(self, name, rows, columns)
        return self._inner.read(name, rows, columns, dtype) if matrix is None else matrix.dequantised(dtype)

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        form = self._form(name)
        name = self._stored_name(name)
        if form is None:
            return self._inner.read_stored(name, rows, columns)
        height, width = self.shape(name)
        (start, stop), span = bounds(rows, height), bounds(columns, width)
        # Whole groups, and of GGUF whole blocks: what is outside the columns is cut off.
        unit = 256 if form.bits == 4 else 1
        left, right = span[0] // unit * unit, min(width, -(-span[1] // unit) * unit)
        step = max(1, 16 * CHUNK_ELEMENTS // max(1, right - left))
        pieces = [
            self._integers(form, name, slice(first, min(first + step, stop)), slice(left, right))
            for first in range(start, stop, step)
        ]
        values = torch.cat([piece.values for piece in pieces])[:, span[0] - left : span[1] - left]
        groups = slice(0, 1)
        if form.bits == 4:
            groups = slice((span[0] - left) // GROUP, -(-(span[1] - left) // GROUP))
        scales = {"scales": torch.cat([piece.scales[:, groups] for piece in pieces])}
        if form.bits == 4:
            scales["shifts"] = torch.cat([p.shifts[:, groups] for p in pieces if p.shifts is not None])
        return Stored(values.contiguous(), "I8" if form.bits == 8 else "U8", scales)

    def read_rows(self, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        assert self._form(name) is None, name
        return self._inner.read_rows(name, ids, dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(loaded_bytes(self._config, name, self.shape(name), dtype) for name in self.names())

    def _integers(self, form: IntegerFormat, name: str, rows: slice, columns: slice) -> ScaledMatrix:
        if form.bits == 8:
            return in_eight_bits(self._inner.read(name, rows, columns, torch.float32))
        if isinstance(self._inner, GgufSource) and self._inner.kind(name) in _FOUR_BITS:
            stored = self._inner.read_stored(name, rows, columns)
            return gguf_in_four_bits(stored.data, Kind[stored.format])
        return in_four_bits(self._inner.read(name, rows, columns, torch.float32))

    def _form(self, name: str) -> IntegerFormat | None:
        form: NumberFormat | None = format_of(self._config.quantization, name)
        assert form is None or isinstance(form, IntegerFormat)
        return form

    def _stored_name(self, name: str) -> str:
        return head_name(self._inner) if name == HEAD else name


def in_eight_bits(weight: Tensor) -> ScaledMatrix:
    """float32 [rows, columns], to the nearest of 8 bits."""
    largest = torch.linalg.vector_norm(weight, math.inf, dim=1, keepdim=True)
    scales = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    values = (weight / scales).round_().to(torch.int8)
    return ScaledMatrix(values, scales, max(1, weight.shape[1]))


def in_four_bits(weight: Tensor) -> ScaledMatrix:
    """float32 [rows, columns], to the nearest of 4 bits, between the least and the greatest of each group."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % GROUP), mode="replicate")
    groups = padded.view(rows, -1, GROUP)
    least, greatest = groups.aminmax(dim=-1)
    # Rounded up: the ends stay within reach.
    scales = ((greatest - least) / 15 * (1 + 2**-8)).bfloat16().float()
    centres = (least + CENTRE * scales).bfloat16().float()
    steps = torch.where(scales > 0, scales, 1.0)
    values = ((groups - centres[..., None]) / steps[..., None] + CENTRE).round().clamp(0, 15).to(torch.uint8)
    values = values.view(rows, -1)[:, :columns].contiguous()
    return ScaledMatrix(values, scales, GROUP, centres - CENTRE * scales)


def gguf_in_four_bits(blocks: Tensor, kind: Kind) -> ScaledMatrix:
    """Blocks u8 [rows, bytes] of Q4_0, Q4_1 or Q4_K as they are; scales and shifts as float32.

    Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
    """
    rows = len(blocks)
    width, size = gguf.GGML_QUANT_SIZES[kind]
    each = blocks.numpy().reshape(-1, size)
    if kind == Kind.Q4_K:
        factors = _halves(each[:, :4])
        fine, fine_shifts = gguf.quants.Q4_K.get_scale_min(each[:, 4:16])
        scales = factors[:, :1] * fine.astype(np.float32)
        shifts = -factors[:, 1:] * fine_shifts.astype(np.float32)
        # 32 bytes hold a group in their lower halves and the next one in their upper ones.
        pairs = each[:, 16:].reshape(-1, width // 64, 32)
    else:
        scales = _halves(each[:, :2])
        shifts = -CENTRE * scales if kind == Kind.Q4_0 else _halves(each[:, 2:4])
        pairs = each[:, size - 16 :].reshape(-1, 1, 16)
    values = np.stack([pairs & 15, pairs >> 4], axis=2)
    return ScaledMatrix(
        torch.from_numpy(values.reshape(rows, -1)),
        torch.from_numpy(scales.reshape(rows, -1)),
        GROUP,
        torch.from_numpy(shifts.reshape(rows, -1)),
    )


def _halves(stored: np.ndarray) -> np.ndarray:
    """Bytes [n, 2 m] of float16 -> float32 [n, m]."""
    return stored.copy().view(np.float16).astype(np.float32)


def _quantization_of(source: WeightSource) -> Quantization:
    """Of a GGUF file: its own 4 bits as they are; 5, 6 and 8 bits, whose groups torch has no product for, as 8 with
    one scale for a row."""
    by_bits: dict[Literal[4, 8], list[str]] = {4: [], 8: []}
    if isinstance(source, GgufSource):
        tied = {HEAD: head_name(source)}
        for name in source.names() | tied.keys():
            stored = tied.get(name, name)
            if len(source.shape(stored)) == 2 and source.kind(stored) not in _PLAIN:
                by_bits[4 if source.kind(stored) in _FOUR_BITS else 8].append(name.removesuffix(".weight"))
    rules = tuple(
        FormatRule(ModuleNames(ending=tuple(sorted(names))), IntegerFormat(bits))
        for bits, names in by_bits.items()
        if names
    )
    return Quantization("gguf", rules, _KEPT_PLAIN)
