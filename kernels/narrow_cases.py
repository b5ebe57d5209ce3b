"""Cases of the product with a matrix of 8-bit numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from outrider.kernels.launch_plans import FP8, LaunchPlan
from outrider.kernels.narrow_matmul import SHARED_BYTES, gpu_resources, plan_narrow_matmul
from outrider.kernels.prepared import Check, Guards, PreparedCase

TOLERANCE = 4e-3  # the result is rounded to bfloat16; sums are in float32


@dataclass(frozen=True)
class NarrowCase:
    """Rows of one type times a matrix of another.

    Attributes:
        num_rows, out_features, in_features: of x and the matrix.
        narrow_rows: x is in FP8, too.
        dtype: of the matrix, FP8 or int8.
        group: columns of the matrix that share a scale; 0: all.
        x_by_group: those of x do, too.
        num_splits: over so many blocks the columns are split.
        has_bias: something is added.
        shared_bytes: what a block may have; 0: what the device gives, or all of them where it is a CPU.
    """

    num_rows: int
    out_features: int
    in_features: int
    narrow_rows: bool
    dtype: torch.dtype = FP8
    group: int = 0
    x_by_group: bool = False
    num_splits: int = 1
    has_bias: bool = False
    shared_bytes: int = 0

    @property
    def name(self) -> str:
        x = "FP8" if self.narrow_rows else "bfloat16"
        matrix = "FP8" if self.dtype == FP8 else "int8"
        scales = f" in groups of {self.group}" if self.group else ""
        splits = f", {self.num_splits} splits" if self.num_splits > 1 else ""
        size = f"{self.out_features}x{self.in_features}"
        return f"narrow_matmul: {self.num_rows} rows in {x}, {size} in {matrix}{scales}{splits}"


_BF16, _FP8 = False, True
# Columns that are no whole chunk, group or share of a warp; features that are no whole tile; tiles of all sizes, full
# and not.
NARROW_CASES = (
    NarrowCase(1, 70, 272, _BF16),
    NarrowCase(8, 64, 1040, _BF16, has_bias=True, num_splits=3),
    NarrowCase(9, 33, 528, _BF16, group=128),
    NarrowCase(33, 65, 288, _BF16, group=128, has_bias=True),
    NarrowCase(64, 64, 1312, _BF16),
    NarrowCase(7, 130, 400, _BF16, torch.int8, has_bias=True),
    NarrowCase(16, 20, 1296, _BF16, torch.int8, group=128, num_splits=2),
    NarrowCase(33, 64, 256, _BF16, torch.int8),
    NarrowCase(64, 72, 544, _BF16, torch.int8, group=64),
    NarrowCase(1, 64, 16, _FP8),
    NarrowCase(7, 100, 1552, _FP8, has_bias=True, num_splits=3),
    NarrowCase(9, 64, 1936, _FP8, group=128, x_by_group=True),
    NarrowCase(33, 66, 688, _FP8, group=128, x_by_group=True, has_bias=True, num_splits=2),
    NarrowCase(40, 64, 1040, _FP8),
    NarrowCase(64, 65, 912, _FP8, group=128, x_by_group=True),
    NarrowCase(50, 64, 272, _FP8, group=192),
)
# Of a layer of a 70B on one of seven ranks, for GPUs alone: a CPU executor takes minutes for one. With the splits
# that an H100 gets.
LARGE_NARROW_CASES = (
    NarrowCase(8, 1792, 8192, _FP8, num_splits=4),
    NarrowCase(33, 8192, 8192, _FP8),
    NarrowCase(33, 8192, 8192, _FP8, group=128, x_by_group=True),
    NarrowCase(33, 8192, 8192, _BF16),
    NarrowCase(33, 8192, 8192, _BF16, torch.int8),
    NarrowCase(64, 8192, 8192, _BF16, group=128),
    NarrowCase(33, 8192, 1280, _FP8),
)


@dataclass(frozen=True)
class _Inputs:
    x: Tensor
    x_scales: Tensor
    weight: Tensor
    weight_scales: Tensor
    bias: Tensor
    expected: Tensor


class ProductCase(Protocol):
    """What cases of products with narrow matrices have in common, see `NarrowCase`."""

    @property
    def name(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def num_splits(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...


def prepared_product(
    case: ProductCase,
    kernel: str,
    plan: Callable[..., tuple[LaunchPlan, ...]],
    x: Tensor,
    operands: Sequence[Tensor | int],
    read: Sequence[Tensor],
    expected: Tensor,
    device: torch.device,
) -> PreparedCase:
    """A product with a narrow matrix on a device.

    Args:
        kernel: its name in reports.
        plan: of its launches, given x, the operands, splits, bytes of shared memory, output and partial sums.
        x: [N, K and more], of which the kernel has K columns.
        read: which of the operands are the matrix and what comes with it.
        expected: [N, O].
    """
    guards = Guards(device)
    shape = (case.num_rows, case.out_features)
    out = guards.empty(shape, torch.bfloat16)
    partial_out = guards.empty((case.num_splits if case.num_splits > 1 else 0, *shape), torch.float32)
    x = x.to(device)[:, : case.in_features]  # rows with more behind them
    plans = plan(
        x,
        *(operand.to(device) if isinstance(operand, Tensor) else operand for operand in operands),
        case.num_splits,
        case.shared_bytes or (gpu_resources(device)[1] if device.type == "cuda" else SHARED_BYTES),
        out,
        partial_out,
    )
    check = Check("out", out, expected, TOLERANCE)
    num_bytes = sum(tensor.nbytes for tensor in read) + x.numel() * x.element_size() + out.nbytes
    num_flops = 2 * case.num_rows * case.out_features * case.in_features
    return PreparedCase(case.name, kernel, plans, (check,), tuple(guards.buffers), num_bytes, num_flops)


def prepare_narrow_matmul(case: NarrowCase, device: torch.device) -> PreparedCase:
    inputs = _inputs(case)
    matrix = (inputs.weight, inputs.weight_scales)
    operands = (inputs.x_scales, *matrix, case.group or case.in_features, inputs.bias)
    return prepared_product(
        case, "narrow_matmul", plan_narrow_matmul, inputs.x, operands, matrix, inputs.expected, device
    )


@cache
def _inputs(case: NarrowCase) -> _Inputs:
    """Made once: a case is prepared anew for every launch. On the CPU; x has 16 columns more, of NaN."""
    random = torch.Generator().manual_seed(case.num_rows)
    rows, features, columns = case.num_rows, case.out_features, case.in_features
    num_groups = -(-columns // case.group) if case.group else 1
    x = torch.full((rows, columns + 16), float("nan"))
    x[:, :columns] = torch.randn(rows, columns, generator=random)
    x[0] *= 30
    weight = torch.randn(features, columns, generator=random)
    if case.dtype == torch.int8:
        weight = (weight * 50).round().clamp(-128, 127)
        weight[:, :2] = torch.tensor([-128.0, 127.0])
    else:
        weight[:, :2] = torch.tensor([448.0, 2.0**-9])
    weight = weight.to(case.dtype)
    x_scales = torch.empty(0, 0)
    if case.narrow_rows:
        x_scales = torch.rand(rows, num_groups if case.x_by_group else 1, generator=random) + 0.1
    weight_scales = (torch.rand(features, num_groups, generator=random) + 0.1) / 64
    bias = torch.randn(features if case.has_bias else 0, generator=random).bfloat16()
    x = x.to(FP8 if case.narrow_rows else torch.bfloat16)
    exact = _scaled(x[:, :columns], x_scales, case) @ _scaled(weight, weight_scales, case).T
    return _Inputs(
        x, x_scales, weight, weight_scales, bias, exact + bias.double() if case.has_bias else exact
    )


def _scaled(values: Tensor, scales: Tensor, case: NarrowCase) -> Tensor:
    """In float64."""
    if scales.numel() == 0:
        return values.double()
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(case.group, dim=1)[:, : values.shape[1]]
    return values.double() * scales.double()
