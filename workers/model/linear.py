"""Matrix times rows, from weights kept in the layout the processor reads fastest.

On a CPU one row times a matrix is bound by reading the matrix. oneDNN's blocked layout in huge pages reads it at
the speed of memory, `F.linear` at about half of it; large matrices in float32 are convolutions where that is faster
still (`convolved_linear.py`). torch offers the layout as private operators (those that `torch.compile` uses with
freezing); they are called in this file only, after a check that they compute what `F.linear` does.
"""

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.model import memory
from outrider.workers.model.convolved_linear import (
    ConvolvedLinear,
    convolution_suits,
    convolutions_are_faster,
)

# oneDNN blocks the matrix alike for every hint of 8 rows or more; a hint of 1 makes float32 several times slower.
ROWS_HINT = 8
# The kernels for 4 to 6 rows read at full speed; those for 1 to 3 rows take a quarter longer.
MIN_ROWS = 4
# oneDNN makes code for every number of rows that a matrix is multiplied with, some 0.6 MB each, of which half stays
# for ever whatever its cache may hold: 256 numbers of rows and the four matrices of a layer are 600 MB. So every
# number up to this, which single trees have, is computed as it is; above it those 8 apart, since a prompt's time goes
# by its rows, and from 256 on, which only several texts have together, eight of each doubling: 65 up to 512.
EXACT_ROWS = 32
_STEP, _STEP_UP_TO = 8, 256
# Where matrices are convolutions those have code for 4, 8, 12, … rows, and all others are padded alike, once.
_CONVOLVED_STEP = 4
# A float32 sum over all columns in one accumulator is farther off than MKL's, which transformers uses; sums over
# fewer columns, added up, are closer, but each product costs 30 us of calls whatever its size. Logits of SmolLM2
# behind several hundred tokens, root mean square from float64, on a processor with AVX2 (with oneDNN's products for
# large matrices, too): 1.5e-5 (1.3e-5) over at most 1024 columns, 0.9e-5 (1.0e-5) over 384, 0.9e-5 by transformers;
# the farthest 1.5e-4, 0.9e-4 and 0.9e-4. All products of a row with half of that model take 27 ms over 1024, 36 over
# 384 and 44 over 256 (tests/support/packed_sums.py).
FLOAT32_SUM_COLUMNS = 1024


class Linear(Protocol):
    """y = x W^T + b, however W is kept: dense, packed, with scales, as a product of two.

    Attributes:
        in_features, out_features: sizes.
        pads: products are made of `padded_rows` rows, because oneDNN makes them. Who makes several products of the
            same rows pads them once, before.
    """

    in_features: int
    out_features: int
    pads: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        ...


@dataclass
class ProductKernels:
    """Which kernels the products of one model run: its linears share one of these, and `Transformer` fills it. Ranks
    agree on their kernels after they have read their weights, and anew when they meet again."""

    selection: KernelSelection = REFERENCES


def make_linear(weight: Tensor, bias: Tensor, packed: bool, exact_sums: bool = True) -> Linear:
    """Keeps a weight in the fastest layout that this machine has for it.

    Args:
        weight: [out, in].
        bias: [out], or no elements for none.
        packed: use the blocked layout, if this machine has it for this dtype. Its blocking depends on
            `torch.get_num_threads()`: set that before.
        exact_sums: see `PackedLinear`.
    """
    if packed and convolution_suits(weight):
        return ConvolvedLinear(weight, bias, _columns_per_sum(weight))
    if packed and weight.device.type == "cpu" and packing_works(weight.dtype):
        return PackedLinear(weight, bias, exact_sums)
    return DenseLinear(weight, bias)


class DenseLinear:
    """The weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """`weight` [out, in], `bias` [out] or no elements for none."""
        self.out_features, self.in_features = weight.shape
        self.pads = weight.device.type == "cpu" and weight.dtype != torch.float32
        self._weight = weight
        self._bias = bias if bias.numel() else None

    def __call__(self, x: Tensor) -> Tensor:
        if not self.pads:
            return F.linear(x, self._weight, self._bias)
        return F.linear(pad_rows(x), self._weight, self._bias)[: len(x)]


class PackedLinear:
    """A copy of the weight in the blocked layout, from which single rows cannot be read."""

    pads = True

    def __init__(self, weight: Tensor, bias: Tensor, exact_sums: bool = True) -> None:
        """
        Args:
            weight: [out, in]; bias: [out], or no elements for none.
            exact_sums: in float32, see FLOAT32_SUM_COLUMNS; without, one sum over all columns: half the time of small
                matrices, for what only drafts.
        """
        self.out_features, self.in_features = weight.shape
        self._bias = bias if bias.numel() else None
        self._columns = _columns_per_sum(weight) if exact_sums else self.in_features
        self._blocks = [_pack(part) for part in weight.split(self._columns, dim=1)]

    def __call__(self, x: Tensor) -> Tensor:
        padded = pad_rows(x)
        product = self._product(padded)
        return product if padded is x else product[: len(x)]

    def _product(self, x: Tensor) -> Tensor:
        if len(self._blocks) == 1:
            return _multiply(x, self._blocks[0], self._bias)
        # The first product is an addition, too: one that is not would be code of its own, see EXACT_ROWS.
        total = x.new_zeros(x.shape[0], self.out_features)
        if self._bias is not None:
            total += self._bias
        for part, block in zip(x.split(self._columns, dim=1), self._blocks, strict=True):
            total = _multiply_add(part, block, total)
        return total


def row_step(dtype: torch.dtype) -> int:
    """Up to EXACT_ROWS rows, products on this machine's CPU are made of multiples of this, 1 or more."""
    return _CONVOLVED_STEP if dtype == torch.float32 and convolutions_are_faster() else 1


def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """How many rows a product of `rows` with a matrix of this dtype is made of: see EXACT_ROWS."""
    if rows <= EXACT_ROWS:
        step = row_step(dtype)
        return max(-(-rows // step) * step, MIN_ROWS)
    step = _STEP if rows <= _STEP_UP_TO else 1 << ((rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def pad_rows(x: Tensor) -> Tensor:
    """x [rows, n] with rows of zeros behind it, `padded_rows` in all."""
    rows, padded = x.shape[0], padded_rows(x.shape[0], x.dtype)
    return x if rows == padded else F.pad(x, (0, 0, 0, padded - rows))


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether the blocked layout exists here for a dtype and gives what `F.linear` gives."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    try:
        with torch.inference_mode():
            got = _multiply_add(x, _pack(weight), _multiply(x, _pack(weight), bias))
    except (RuntimeError, AttributeError):
        return False
    # Roundings of values up to 60: 2^-9 relative in bfloat16, far less in float32.
    tolerance = 0.5 if dtype == torch.bfloat16 else 1e-4
    want = F.linear(x, weight, bias) + F.linear(x, weight)
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance)


def _columns_per_sum(weight: Tensor) -> int:
    """Columns of a packed block: all in bfloat16, whose rounding hides the sum's; even shares in float32."""
    columns = weight.shape[1]
    if weight.dtype != torch.float32:
        return columns
    num_sums = -(-columns // FLOAT32_SUM_COLUMNS)
    return -(-columns // num_sums // 16) * 16


def _pack(weight: Tensor) -> Tensor:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
    memory.collapse_packed(packed)
    return packed


def _multiply(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")


def _multiply_add(x: Tensor, packed_weight: Tensor, addend: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, packed_weight, None, "add")
