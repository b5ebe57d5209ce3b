"""Products with matrices of 4 bits on a GPU: by our kernel `int4_matmul`, by torch's, or dequantised for each.

torch's (tinygemm) is called as torchao does, after a check. Both ran on an H100 (docs/gpu-report.md).
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.int4_matmul import (
    CENTRE,
    TILE_COLUMNS_OF_MATRIX,
    TILE_ROWS_OF_MATRIX,
    dequantised_tiles,
    int4_matmul,
    packed_in_tiles,
)
from outrider.kernels.narrow_matmul import MAX_ROWS
from outrider.workers.model.linear import ProductKernels
from outrider.workers.weights.scaled import ScaledMatrix

COLUMNS = TILE_COLUMNS_OF_MATRIX  # come in as many


class TiledInt4Linear:
    """uint8 from 0 to 15, a scale and a shift for each group of columns; bfloat16 rows, float32 sums.

    The matrix is kept once, in the layout that both products read, with scales and the values of an 8 in bfloat16; a
    number is rounded to bfloat16 when it is widened. Rows are multiplied by the kernel, one alone, too, for which
    torch's would take as long by what both read: so a row's bits are those that it has in a tree. torch's takes them
    where the kernel is not in use.

    Attributes:
        most_rows: that the kernel multiplies, 64 at a time.
        most_rows_of_torch: that torch's product does.
    """

    pads = False

    def __init__(self, matrix: ScaledMatrix, bias: Tensor, kernels: ProductKernels) -> None:
        """`matrix` as in `make_integer_linear`, of columns a multiple of `COLUMNS`; `bias` [out], or no elements for
        none."""
        assert matrix.shifts is not None
        self.out_features, self.in_features = matrix.values.shape
        # Dequantising for each product takes as long as six passes of the kernel, and as torch's of 64 rows: by what
        # 8 bits and torch's product took on an H100, see docs/gpu-report.md.
        self.most_rows = 6 * MAX_ROWS
        self.most_rows_of_torch = MAX_ROWS if tinygemm_works(matrix.values.device) else 0
        self._group = matrix.group
        self._bias = bias
        self._kernels = kernels
        self._packed = packed_in_tiles(matrix.values)
        self._of_groups = _of_groups(matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in], bfloat16."""
        if self._kernels.selection.int4_matmul:
            if len(x) > self.most_rows:
                return self._dequantised(x)
            operands = (self._packed, self._of_groups, self._group, self.out_features, self._bias)
            parts = [int4_matmul(part, *operands, use_kernel=True) for part in x.split(MAX_ROWS)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(x) > self.most_rows_of_torch:
            return self._dequantised(x)
        out = _by_tinygemm(x, self._packed, self._of_groups, self._group)[:, : self.out_features]
        return out + self._bias if self._bias.numel() else out

    def _dequantised(self, x: Tensor) -> Tensor:
        weight = dequantised_tiles(self._packed, self._of_groups, self._group)[: self.out_features]
        return F.linear(x, weight, self._bias if self._bias.numel() else None)


def _of_groups(matrix: ScaledMatrix) -> Tensor:
    """bfloat16 [G, out and padding, 2], scales and values of an 8."""
    assert matrix.shifts is not None
    added = (0, 0, 0, -len(matrix.values) % TILE_ROWS_OF_MATRIX)
    of_groups = (matrix.scales, matrix.shifts + CENTRE * matrix.scales)
    return torch.stack([F.pad(part, added).t() for part in of_groups], dim=2).to(torch.bfloat16).contiguous()


def _by_tinygemm(x: Tensor, packed: Tensor, of_groups: Tensor, group: int) -> Tensor:
    out: Tensor = torch.ops.aten._weight_int4pack_mm(x.contiguous(), packed, group, of_groups)
    return out


@functools.cache
def tinygemm_works(device: torch.device) -> bool:
    """Whether torch's product is there, reads the layout, and gives what that of the dequantised numbers gives; a
    warning where it does not."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (32, 256), dtype=torch.uint8, generator=generator)
    scales, centres = torch.rand(2, 32, 8, generator=generator).bfloat16().float()
    matrix = ScaledMatrix(values, scales, 32, centres - CENTRE * scales)
    x = torch.randn(5, 256, generator=generator).bfloat16()
    packed, of_groups = packed_in_tiles(values).to(device), _of_groups(matrix).to(device)
    try:
        got = _by_tinygemm(x.to(device), packed, of_groups, matrix.group).cpu().float()
    except (RuntimeError, AttributeError) as error:  # torch's NotImplementedError is a RuntimeError
        problem = str(error).splitlines()[0]
    else:
        want = x.float() @ matrix.dequantised(torch.float32).T
        # Values up to 200, rounded to bfloat16.
        problem = "" if (got - want).abs().max() <= 1.0 else "its products are wrong"
    if problem:
        warnings.warn(f"torch does not multiply int4 on {device}: {problem}", stacklevel=2)
    return not problem
