"""Cases of the product with a matrix of 4 bits."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from outrider.kernels.int4_matmul import CENTRE, packed_in_tiles, plan_int4_matmul
from outrider.kernels.narrow_cases import prepared_product
from outrider.kernels.prepared import PreparedCase


@dataclass(frozen=True)
class Int4Case:
    """Rows in bfloat16 times a matrix of 4 bits.

    Attributes:
        num_rows, out_features, in_features: of x and the matrix.
        group: columns that share a scale and a centre.
        num_splits: over so many blocks the columns are split.
        has_bias: something is added.
        shared_bytes: what a block may have; 0: what the device gives, or all of them where it is a CPU.
    """

    num_rows: int
    out_features: int
    in_features: int
    group: int
    num_splits: int = 1
    has_bias: bool = False
    shared_bytes: int = 0

    @property
    def name(self) -> str:
        splits = f", {self.num_splits} splits" if self.num_splits > 1 else ""
        size = f"{self.out_features}x{self.in_features}"
        return f"int4_matmul: {self.num_rows} rows, {size} in groups of {self.group}{splits}"


# Columns that are half of a last chunk; features that are no whole tile of the matrix or of a block; rings that are
# gone through more than once; tiles of all sizes, full and not.
INT4_CASES = (
    Int4Case(1, 70, 384, 32),
    Int4Case(5, 60, 256, 64),
    Int4Case(8, 64, 2304, 128, num_splits=3, has_bias=True),
    Int4Case(7, 33, 640, 64, has_bias=True),
    Int4Case(9, 130, 1408, 128),
    Int4Case(16, 20, 1280, 256, num_splits=2),
    Int4Case(33, 65, 896, 32, has_bias=True),
    Int4Case(40, 64, 1152, 128, num_splits=2),
    Int4Case(64, 72, 640, 32),
    Int4Case(41, 57, 128, 128),
    Int4Case(64, 64, 1024, 256),
)
# Of a layer of a 70B on one of seven ranks, for GPUs alone: a CPU executor takes minutes for one. With the splits
# that an H100 gets.
LARGE_INT4_CASES = (
    Int4Case(1, 8192, 8192, 128),
    Int4Case(8, 1792, 8192, 128, num_splits=4),
    Int4Case(33, 8192, 8192, 128),
    Int4Case(33, 8192, 8192, 32),
    Int4Case(64, 8192, 8192, 128),
    Int4Case(64, 8192, 1280, 32),
)


@dataclass(frozen=True)
class _Inputs:
    x: Tensor
    packed: Tensor
    of_groups: Tensor
    bias: Tensor
    expected: Tensor


def prepare_int4_matmul(case: Int4Case, device: torch.device) -> PreparedCase:
    inputs = _inputs(case)
    matrix = (inputs.packed, inputs.of_groups)
    operands = (*matrix, case.group, inputs.bias)
    return prepared_product(
        case, "int4_matmul", plan_int4_matmul, inputs.x, operands, matrix, inputs.expected, device
    )


@cache
def _inputs(case: Int4Case) -> _Inputs:
    """Made once: a case is prepared anew for every launch. On the CPU; x has 16 columns more, of NaN."""
    random = torch.Generator().manual_seed(case.num_rows)
    rows, features, columns = case.num_rows, case.out_features, case.in_features
    num_groups, padded = columns // case.group, -(-features // 8) * 8
    x = torch.full((rows, columns + 16), float("nan"))
    x[:, :columns] = torch.randn(rows, columns, generator=random)
    x[0] *= 30
    x = x.bfloat16()
    values = torch.randint(0, 16, (features, columns), dtype=torch.uint8, generator=random)
    scales = (torch.rand(num_groups, padded, generator=random) + 0.1) / 64
    centres = torch.randn(num_groups, padded, generator=random) / 16
    of_groups = torch.stack((scales, centres), dim=2).bfloat16()
    bias = torch.randn(features if case.has_bias else 0, generator=random).bfloat16()
    scale, centre = (
        part[:, :features].T.double().repeat_interleave(case.group, dim=1) for part in of_groups.unbind(2)
    )
    weight = ((values.double() - CENTRE) * scale + centre).bfloat16()
    exact = x[:, :columns].double() @ weight.double().T
    expected = exact + bias.double() if case.has_bias else exact
    return _Inputs(x, packed_in_tiles(values), of_groups, bias, expected)
