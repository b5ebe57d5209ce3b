"""Products with matrices of narrow numbers.

`NarrowLinear`, `ScaledMmLinear` and `RowScaledLinear` ran on an H100 (docs/gpu-report.md), the others not on a GPU;
`ScaledMmLinear` runs in tests as far as torch has it for a CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from outrider.kernels.narrow_matmul import MAX_ROWS, kernel_takes, narrow_matmul
from outrider.kernels.selection import KernelSelection
from outrider.workers.model.integer_linear import make_integer_linear
from outrider.workers.model.linear import DenseLinear, Linear, ProductKernels, make_linear, pad_rows
from outrider.workers.weights.inputs import DynamicInputs, Inputs, StaticInputs
from outrider.workers.weights.scaled import (
    FP8,
    ScaledMatrix,
    round_inputs,
    rounded_inputs,
)

# Columns that share a scale where torch multiplies groups: `ScalingType.BlockWise1x128`, on Hopper.
GROUP = 128
_ALIGNED = 16  # rows and columns of an FP8 matrix come in as many, or torch does not multiply with it


def make_scaled_linear(
    matrix: ScaledMatrix,
    bias: Tensor,
    dtype: torch.dtype,
    packed: bool,
    kernels: ProductKernels | None = None,
    only_drafts: bool = False,
) -> Linear:
    """Keeps a matrix in the way that this machine multiplies with it fastest.

    Args:
        matrix: where products are made.
        bias: [out], or no elements for none.
        dtype: of the rows that go in and come out.
        packed: on a CPU, use a layout for fast products: integers', where torch has one, see `make_integer_linear`;
            else dequantise it once, into that of `PackedLinear`, and what it saved in memory is gone.
        kernels: those that its products may run; None: none.
        only_drafts: its products need not be exact, see `dynamic_int8`.
    """
    inner = _linear_of_torch(matrix, bias, dtype, packed, kernels or ProductKernels(), only_drafts)
    if kernels is not None and NarrowLinear.takes(matrix, dtype):
        return NarrowLinear(matrix, bias, inner, kernels)
    return inner


def _linear_of_torch(
    matrix: ScaledMatrix,
    bias: Tensor,
    dtype: torch.dtype,
    packed: bool,
    kernels: ProductKernels,
    only_drafts: bool,
) -> Linear:
    """As `make_scaled_linear`, without `narrow_matmul`."""
    device = matrix.values.device
    inputs = matrix.inputs
    if (
        device.type == "cuda"
        and multiplies_fp8(matrix, dtype, torch.cuda.get_device_capability(device))
        and scaled_mm_works(device, in_groups=matrix.scales.shape[1] > 1)
    ):
        return ScaledMmLinear(matrix, bias, dtype, kernels)
    if packed or device.type == "cuda":
        integers = make_integer_linear(matrix, bias, dtype, kernels, only_drafts)
        if integers is not None:
            return integers
    if packed and device.type == "cpu":
        inner: Linear = make_linear(matrix.dequantised(dtype), bias, packed)
    elif device.type == "cuda" and dtype == torch.bfloat16 and _is_scaled_by_row(matrix):
        inner = RowScaledLinear(matrix, bias)
    else:
        inner = DequantisingLinear(matrix, bias, dtype)
    return inner if inputs is None else RoundedLinear(inner, inputs, matrix.group, kernels)


def multiplies_fp8(matrix: ScaledMatrix, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether torch multiplies this matrix with rows of `dtype` in FP8 on a GPU of this compute capability.

    Scales by row on 8.9, 9 and 10 (on 12.0 cuBLAS has none: pytorch issue 192707); groups of 128 columns on 9.0,
    where alone cuBLASLt has them (pytorch pull request 166639).
    """
    rows, columns = matrix.values.shape
    fits = (
        matrix.values.dtype == FP8
        and dtype == torch.bfloat16
        and (rows % _ALIGNED, columns % _ALIGNED) == (0, 0)
    )
    if not fits or matrix.inputs is None or matrix.shifts is not None:
        return False
    if matrix.scales.shape[1] == 1:
        return capability == (8, 9) or capability[0] in (9, 10)
    by_group = not isinstance(matrix.inputs, StaticInputs) and matrix.inputs.by_group
    return by_group and matrix.group == GROUP and columns % GROUP == 0 and capability == (9, 0)


@functools.cache
def scaled_mm_works(device: torch.device, in_groups: bool) -> bool:
    """Whether `ScaledMmLinear` gives on a device what the product of the dequantised numbers gives, with scales by
    row or by group; a warning where it does not."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, group = 32, 2 * GROUP, GROUP if in_groups else 2 * GROUP
    values = torch.randn(rows, columns, generator=generator).to(FP8)
    scales = torch.rand(rows, columns // group, generator=generator) + 0.5
    matrix = ScaledMatrix(values, scales, group, inputs=DynamicInputs(by_group=in_groups))
    x, no_bias = torch.randn(5, columns, generator=generator).bfloat16(), torch.empty(0)
    want = make_scaled_linear(matrix, no_bias, torch.float32, packed=False)(x.float())
    try:
        got = ScaledMmLinear(matrix.to(device), no_bias, torch.bfloat16)(x.to(device)).cpu().float()
    except (RuntimeError, ValueError) as error:  # torch's NotImplementedError is a RuntimeError
        problem = str(error).splitlines()[0]
    else:
        # bfloat16 rounds values up to some 60 to 2^-9.
        problem = "" if (got - want).abs().max() <= 0.25 else "its products are wrong"
    if problem:
        warnings.warn(f"FP8 is not multiplied on {device}, but dequantised: {problem}", stacklevel=2)
    return not problem


class DequantisingLinear:
    """Keeps the narrow numbers, and makes of them a matrix of the rows' type for each product."""

    def __init__(self, matrix: ScaledMatrix, bias: Tensor, dtype: torch.dtype) -> None:
        """`bias` [out], or no elements for none."""
        self.out_features, self.in_features = matrix.values.shape
        self.pads = matrix.values.device.type == "cpu" and dtype != torch.float32
        self._matrix = matrix
        self._bias = bias
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        return DenseLinear(self._matrix.dequantised(self._dtype), self._bias)(x)


class RowScaledLinear:
    """FP8 or int8 with a scale for each row: multiplied as they are, in bfloat16, which has them exactly; then the
    product is scaled, in float32. A matrix is read and written a fourth as often as where it is dequantised."""

    pads = False

    def __init__(self, matrix: ScaledMatrix, bias: Tensor) -> None:
        """`bias` [out], or no elements for none."""
        assert _is_scaled_by_row(matrix)
        self.out_features, self.in_features = matrix.values.shape
        self._values = matrix.values
        self._scales = matrix.scales[:, 0].contiguous()
        self._bias = bias if bias.numel() else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in], bfloat16."""
        out = F.linear(x, self._values.to(x.dtype))
        out *= self._scales  # in float32, and rounded to bfloat16 once more
        return out if self._bias is None else out + self._bias


class RoundedLinear:
    """Rounds rows to FP8 and back before a product: what a product of FP8 numbers comes to."""

    def __init__(self, inner: Linear, inputs: Inputs, group: int, kernels: ProductKernels) -> None:
        """`inner` multiplies; `inputs` and `group` as in `round_inputs`; `kernels` may have `round_rows`."""
        self.out_features, self.in_features, self.pads = inner.out_features, inner.in_features, inner.pads
        self._inner = inner
        self._inputs = inputs
        self._group = group
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        use_kernel = self._kernels.selection.round_rows
        return self._inner(rounded_inputs(x, self._inputs, self._group, use_kernel))


class NarrowLinear:
    """FP8 or int8 with scales by row or by group, on a GPU: few rows are multiplied by `narrow_matmul`, which reads
    the matrix as it lies; more, and all while the kernel is not in use, by another class.

    Attributes:
        inner: that one, with the same matrix.
        most_rows: that the kernel multiplies.
    """

    def __init__(self, matrix: ScaledMatrix, bias: Tensor, inner: Linear, kernels: ProductKernels) -> None:
        """`bias` [out], or no elements for none; `inner` keeps the same matrix."""
        self.out_features, self.in_features, self.pads = inner.out_features, inner.in_features, inner.pads
        self.inner = inner
        # As measured on an H100, see docs/gpu-report.md: torch's products in FP8 catch up at some 64 rows with scales
        # by row, at some 24 by group; what is dequantised for each product takes as long as six passes.
        if not isinstance(inner, ScaledMmLinear):
            self.most_rows = 6 * MAX_ROWS
        else:
            self.most_rows = MAX_ROWS if matrix.scales.shape[1] == 1 else MAX_ROWS // 4
        self._matrix = matrix
        self._bias = bias
        self._kernels = kernels
        self._no_scales = matrix.scales.new_empty(0)

    @staticmethod
    def takes(matrix: ScaledMatrix, dtype: torch.dtype) -> bool:
        """Whether the kernel multiplies this matrix with rows of `dtype`."""
        rounds = matrix.inputs is not None
        return (
            matrix.values.device.type == "cuda"
            and dtype == torch.bfloat16
            and matrix.shifts is None
            and (matrix.values.dtype == FP8 or not rounds)
            and kernel_takes(matrix.values, matrix.scales, matrix.group)
        )

    def __call__(self, x: Tensor) -> Tensor:
        kernels = self._kernels.selection
        if not kernels.narrow_matmul or len(x) > self.most_rows:
            return self.inner(x)
        parts = [self._product(part, kernels) for part in x.split(MAX_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _product(self, x: Tensor, kernels: KernelSelection) -> Tensor:
        """Of at most `MAX_ROWS` rows."""
        matrix, scales = self._matrix, self._no_scales
        if matrix.inputs is not None:
            x, scales = round_inputs(x, matrix.inputs, matrix.group, use_kernel=kernels.round_rows)
        return narrow_matmul(x, scales, matrix.values, matrix.scales, matrix.group, self._bias, True)


class ScaledMmLinear:
    """FP8 times FP8 on the GPU's tensor cores, accumulated in float32, see `multiplies_fp8`."""

    pads = False

    def __init__(
        self,
        matrix: ScaledMatrix,
        bias: Tensor,
        dtype: torch.dtype,
        kernels: ProductKernels | None = None,
    ) -> None:
        """`bias` [out], or no elements for none; `kernels`: `round_rows` may be among them."""
        assert matrix.inputs is not None
        self._kernels = kernels or ProductKernels()
        self.out_features, self.in_features = matrix.values.shape
        self._inputs = matrix.inputs
        self._group = matrix.group
        self._values = matrix.values.t()  # [in, out], which torch wants column by column
        self._bias = bias if bias.numel() else None
        self._dtype = dtype
        if matrix.scales.shape[1] == 1:
            self._recipe = ScalingType.RowWise
            self._scales = matrix.scales.t().contiguous()  # [1, out]
        else:
            self._recipe = ScalingType.BlockWise1x128
            self._scales = matrix.scales.t().contiguous().t()  # [out, G], column by column

    def __call__(self, x: Tensor) -> Tensor:
        by_column = self._recipe == ScalingType.BlockWise1x128
        use_kernel = self._kernels.selection.round_rows
        values, scales = round_inputs(x, self._inputs, self._group, by_column, use_kernel)
        out = F.scaled_mm(
            values,
            self._values,
            scales,
            self._recipe,
            self._scales,
            self._recipe,
            output_dtype=self._dtype,
        )
        out = out[: len(x)]
        return out if self._bias is None else out + self._bias


class JoinedLinear:
    """Several products of the same rows side by side: matrices that are not stored alike, in place of one."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        """All with the same `in_features`."""
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.pads = any(part.pads for part in parts)
        self._parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        padded = pad_rows(x) if self.pads else x
        return torch.cat([part(padded) for part in self._parts], dim=1)[: len(x)]


def _is_scaled_by_row(matrix: ScaledMatrix) -> bool:
    """Narrow numbers that bfloat16 has exactly, a scale for each row and nothing added."""
    is_exact = matrix.values.dtype in (FP8, torch.int8)
    return is_exact and matrix.scales.shape[1] == 1 and matrix.shifts is None
