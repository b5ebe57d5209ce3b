"""The layouts of narrow numbers that part 11 looks at: how each is made of a plain matrix, and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fp8_format import Fp8Format, block_fp8, fbgemm_fp8
from outrider.workers.weights.inputs import DynamicInputs
from outrider.workers.weights.integers import IntegerFormat, in_eight_bits, in_four_bits
from outrider.workers.weights.packed_format import PackedFormat
from outrider.workers.weights.quantization import (
    FormatRule,
    ModuleNames,
    NumberFormat,
    Quantization,
    format_of,
)
from outrider.workers.weights.scaled import FP8, FP8_MAX, ScaledMatrix
from outrider.workers.weights.source import Stored, WeightSource, bounds
from outrider.workers.weights.tensors import loaded_bytes

BLOCK = 128
GROUP = 128
FBGEMM_BOUND = 1200.0  # of Meta's 405B
LARGEST_INPUT = 8.0  # what a calibration would have seen: rows are of order 1
_HIGHEST = 7  # of 4 bits with the middle at 8
_WHOLE = slice(None)

Narrow = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """One way to store matrices.

    Attributes:
        name: for reports.
        form: reads the stored tensors.
        narrow: of float32 [rows, columns] the tensors of a file by the ends of their names, each of two dimensions.
        rounds_inputs: whether the rows that a matrix is multiplied with are rounded to FP8.
        bits: of a number.
    """

    name: str
    form: NumberFormat
    narrow: Narrow
    rounds_inputs: bool = False
    bits: int = 8

    def matrix(self, weight: Tensor) -> ScaledMatrix:
        """Of float32 [rows, columns], as a loader reads it."""
        rows, columns = weight.shape
        return self.form.scaled(self.narrow(weight), (0, rows), (0, columns))


class RememberedSource:
    """A source of plain values that makes each tensor once: a part builds the same model dozens of times. A
    `WeightSource`, for a model on one rank."""

    def __init__(self, inner: WeightSource) -> None:
        self.config = inner.config
        self._inner = inner
        self._whole: dict[str, Tensor] = {}

    def names(self) -> set[str]:
        return self._inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        if name not in self._whole:
            self._whole[name] = self._inner.read(name, _WHOLE, _WHOLE, torch.float32)
        part = self._whole[name][rows]
        part = part[:, columns] if part.dim() == 2 else part
        return part.to(dtype, copy=True).contiguous()

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        return Stored(self.read(name, rows, columns, torch.float32), "F32", {})

    def read_rows(self, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._inner.read_rows(name, ids, dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return self._inner.total_bytes(dtype)


class NarrowSource:
    """A source of plain values whose linear layers but the head are stored in a layout. A `WeightSource`, of whole
    matrices: for a model on one rank."""

    def __init__(self, inner: WeightSource, layout: Layout) -> None:
        rule = FormatRule(ModuleNames(every=True), layout.form)
        quantization = Quantization(layout.name, (rule,), ModuleNames(ending=("lm_head",)))
        self._inner = inner
        self._layout = layout
        self._config = replace(inner.config, quantization=quantization)
        self._stored: dict[str, Mapping[str, Tensor]] = {}

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return self._inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        assert format_of(self._config.quantization, name) is None, name
        return self._inner.read(name, rows, columns, dtype)

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        shape = self.shape(name)
        whole = (bounds(rows, shape[0]), bounds(columns, shape[1])) == ((0, shape[0]), (0, shape[1]))
        assert whole, (name, rows, columns)
        if name not in self._stored:
            weight = self._inner.read(name, _WHOLE, _WHOLE, torch.float32)
            self._stored[name] = self._layout.narrow(weight)
        stored = dict(self._stored[name])
        first, described = next(iter(self._layout.form.tensors(*shape).items()))
        return Stored(stored.pop(first), (described.formats or ("",))[0], stored)

    def read_rows(self, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._inner.read_rows(name, ids, dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(loaded_bytes(self._config, name, self.shape(name), dtype) for name in self.names())


def _in_fp8(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _by_row(weight: Tensor) -> Mapping[str, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / FP8_MAX
    return {"weight": _in_fp8(weight, scales), "weight_scale": scales}


def _by_tensor(weight: Tensor) -> Mapping[str, Tensor]:
    scale = (weight.abs().amax() / FP8_MAX).view(1, 1)
    # Another one for each matrix, so that queries, keys and values stay three products.
    inputs = LARGEST_INPUT / FP8_MAX * (1 + weight[:1, :1].abs())
    return {"weight": _in_fp8(weight, scale), "weight_scale": scale, "input_scale": inputs}


def _by_block(weight: Tensor) -> Mapping[str, Tensor]:
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / FP8_MAX
    of_elements = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    return {"weight": _in_fp8(weight, of_elements), "weight_scale_inv": scales}


def _eight_bits(weight: Tensor) -> Mapping[str, Tensor]:
    matrix = in_eight_bits(weight)
    return {"weight": matrix.values, "scales": matrix.scales}


def _four_bits(weight: Tensor) -> Mapping[str, Tensor]:
    matrix = in_four_bits(weight)
    assert matrix.shifts is not None
    return {"weight": matrix.values, "scales": matrix.scales, "shifts": matrix.shifts}


def _four_bits_in_words(weight: Tensor) -> Mapping[str, Tensor]:
    rows, columns = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(2, keepdim=True) / _HIGHEST
    values = (groups / scales).round().clamp(-8, 7).int().flatten(1)[:, :columns] + 8
    eights = values.view(rows, -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    words = eights[:, :, 0]
    for place in range(1, 8):
        words = words | eights[:, :, place]
    shape = torch.tensor([[rows], [columns]])
    return {"weight_packed": words, "weight_shape": shape, "weight_scale": scales[:, :, 0]}


LAYOUTS = (
    Layout("FP8 by row (fbgemm)", fbgemm_fp8(FBGEMM_BOUND), _by_row, True),
    Layout("FP8 by row (compressed-tensors)", Fp8Format("row", inputs=DynamicInputs()), _by_row, True),
    Layout("FP8 by tensor, static", Fp8Format("tensor", input_scale_name="input_scale"), _by_tensor, True),
    Layout("FP8 by block of 128", block_fp8(BLOCK, BLOCK), _by_block, True),
    Layout("FP8 by row, weights alone", Fp8Format("row"), _by_row),
    Layout("int8 by row", IntegerFormat(8), _eight_bits),
    Layout("int4 in groups of 32", IntegerFormat(4), _four_bits, bits=4),
    Layout("int4 in groups of 128", PackedFormat("packed", 4, GROUP, False), _four_bits_in_words, bits=4),
)
