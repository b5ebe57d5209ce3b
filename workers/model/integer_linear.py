"""Products with matrices of 8-bit and 4-bit integers, whose rows' numbers do not depend on how many there are.

On a CPU through operators of torch that `torch.compile` uses: oneDNN's int8 product (VNNI) and tinygemm's int4 one.
On a GPU 4 bits alone, see `tiled_int4`.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.workers.model import memory
from outrider.workers.model.dynamic_int8 import DynamicInt8Linear, dynamic_int8_works
from outrider.workers.model.linear import Linear, ProductKernels, padded_rows
from outrider.workers.model.tiled_int4 import COLUMNS, TiledInt4Linear
from outrider.workers.weights.scaled import ScaledMatrix

GROUPS = (32, 64, 128, 256)  # columns that share a scale, of those torch's int4 products know
_CENTRE = 8  # torch's int4 products keep, of a group, the value of the middle integer
# A row in two planes of bytes is an integer of this size at most; in three, of the second.
_LARGEST_OF_PLANES = {2: 127 * 256, 3: 127 * 65536}
_INT4_ROWS = 16  # torch packs so many rows of a matrix at a time


def make_integer_linear(
    matrix: ScaledMatrix, bias: Tensor, dtype: torch.dtype, kernels: ProductKernels, only_drafts: bool = False
) -> Linear | None:
    """The product for a matrix of integers; None where there is no fast one for its groups, `dtype` or this machine.

    Args:
        matrix: int8 with a scale for each row, or uint8 from 0 to 15 in groups with shifts.
        bias: [out], or no elements for none.
        dtype: of the rows that go in and come out.
        kernels: those that its products may run.
        only_drafts: where there is no exact product of 8 bits, another will do, see `dynamic_int8`.
    """
    device = matrix.values.device.type
    if matrix.inputs is not None or device not in ("cpu", "cuda"):
        return None
    if matrix.values.dtype == torch.int8 and matrix.scales.shape[1] == 1 and matrix.shifts is None:
        if device == "cpu" and int8_works():
            return Int8Linear(matrix, bias, dtype)
        if device == "cpu" and only_drafts and dynamic_int8_works():
            return DynamicInt8Linear(matrix.values, matrix.scales[:, 0], bias)
        return None
    if not multiplies_int4(matrix, dtype, device):
        return None
    in_groups = matrix.in_groups_of(_widths(matrix)[-1])
    if device == "cuda":
        return TiledInt4Linear(in_groups, bias, kernels)
    return Int4Linear(in_groups, bias) if int4_works() else None


def multiplies_int4(matrix: ScaledMatrix, dtype: torch.dtype, device: str) -> bool:
    """Whether int4 products take this matrix and rows of `dtype` on a device, "cpu" or "cuda"."""
    fits = matrix.values.dtype == torch.uint8 and matrix.shifts is not None and matrix.inputs is None
    whole_tiles = device != "cuda" or matrix.values.shape[1] % COLUMNS == 0
    return fits and whole_tiles and dtype == torch.bfloat16 and bool(_widths(matrix))


def _widths(matrix: ScaledMatrix) -> list[int]:
    """Of those in `GROUPS`, the ones that its groups are made of."""
    columns = matrix.values.shape[1]
    return [width for width in GROUPS if matrix.group % width == 0 and columns % width == 0]


class Int8Linear:
    """int8 with a scale for each row of the matrix; sums of products of integers, which are exact.

    A row is rounded to a whole number of steps between 0 and its largest magnitude: 32,512 of them, or, for float32,
    8 million. That is finer than its dtype for all that the sum can show of it: the weights are quantised and
    activations, in effect, are not. The number is split into bytes, h * 256 + l, and oneDNN multiplies h and l like
    rows of their own, so that reading the matrix, which is what time goes to, happens once.
    """

    pads = False

    def __init__(self, matrix: ScaledMatrix, bias: Tensor, dtype: torch.dtype) -> None:
        """`matrix` as in `make_integer_linear`; `bias` [out], or no elements for none."""
        self.out_features, self.in_features = matrix.values.shape
        self._packed = torch.ops.onednn.qlinear_prepack(matrix.values.contiguous(), None)
        memory.collapse_packed(self._packed)
        self._scales = matrix.scales.flatten().contiguous()
        self._zeros = torch.zeros(self.out_features, dtype=torch.int64)
        self._bias = bias.float() if bias.numel() else None
        self._dtype = dtype
        self._planes = 3 if dtype == torch.float32 else 2

    def __call__(self, x: Tensor) -> Tensor:
        num_rows, planes = x.shape[0], self._planes
        # oneDNN's code for four rows is its fastest, see `padded_rows` for the rest.
        padded = 2 if num_rows <= 2 else padded_rows(num_rows, torch.uint8)
        values = F.pad(x, (0, 0, 0, padded - num_rows)).float() if padded > num_rows else x.float()
        # `vector_norm` takes up to ten times as long as `abs().amax()`.
        largest = values.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        steps = largest / _LARGEST_OF_PLANES[planes]
        # A byte of 128 stands for 0: the operator takes unsigned bytes, and carries are what the offset adds.
        offset = sum(128 << (8 * plane) for plane in range(planes))
        if planes == 2:
            whole = torch.addcdiv(values.new_tensor(offset + 0.5), values, steps).to(torch.int32)
        else:
            whole = (values / steps).round_().to(torch.int32).add_(offset)
        in_bytes = whole.view(torch.uint8).view(padded, self.in_features, 4)[:, :, :planes]
        stacked = in_bytes.permute(2, 0, 1).reshape(planes * padded, self.in_features)
        sums = _multiply_bytes(stacked, self._packed, self._scales, self._zeros)
        low, *higher = sums.view(planes, padded, self.out_features)
        # The smallest first.
        out = torch.add(low, higher[0], alpha=256)
        for plane, sum_of_plane in enumerate(higher[1:], start=2):
            out.add_(sum_of_plane, alpha=256**plane)
        out *= steps
        if self._bias is not None:
            out += self._bias
        return out[:num_rows].to(self._dtype)


class Int4Linear:
    """uint8 from 0 to 15, a scale and a shift for each group of columns; bfloat16 rows, float32 sums.

    torch keeps scales, and the values of an 8, in bfloat16; what it multiplies with is that in float32.
    """

    pads = False

    def __init__(self, matrix: ScaledMatrix, bias: Tensor) -> None:
        """`matrix` as in `make_integer_linear`; `bias` [out], or no elements for none."""
        assert matrix.shifts is not None
        self.out_features, self.in_features = matrix.values.shape
        self._group = matrix.group
        self._bias = bias if bias.numel() else None
        added = (0, 0, 0, -self.out_features % _INT4_ROWS)
        values = F.pad(matrix.values, added)
        centres = matrix.shifts + _CENTRE * matrix.scales
        of_groups = torch.stack([F.pad(matrix.scales, added).t(), F.pad(centres, added).t()], dim=2)
        of_groups = of_groups.to(torch.bfloat16).contiguous()  # [G, out, 2]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
        self._packed, self._of_groups = _in_huge_pages(packed), _in_huge_pages(of_groups)

    def __call__(self, x: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        out: Tensor = multiply(x.contiguous(), self._packed, self._group, self._of_groups)
        out = out[:, : self.out_features]
        return out if self._bias is None else out + self._bias


@functools.cache
def int8_works() -> bool:
    """Whether oneDNN multiplies bytes exactly here: without VNNI its sums of two products are cut off at 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    columns = 64
    values = torch.full((16, columns), 127, dtype=torch.int8)
    scales, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    x = torch.tensor([[255], [0]], dtype=torch.uint8).expand(2, columns).contiguous()
    try:
        packed = torch.ops.onednn.qlinear_prepack(values, None)
        got = _multiply_bytes(x, packed, scales, zeros)
    except (RuntimeError, AttributeError):
        return False
    want = torch.tensor([[127.0 * 127], [-128.0 * 127]]) * columns
    return torch.equal(got, want.expand(2, 16))


@functools.cache
def int4_works() -> bool:
    """Whether torch's int4 product for a CPU is there and gives what that of the dequantised numbers gives; a warning
    where it does not."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (32, 256), dtype=torch.uint8, generator=generator)
    scales, shifts = torch.rand(2, 32, 256 // GROUPS[0], generator=generator).bfloat16().float()
    matrix = ScaledMatrix(values, scales, GROUPS[0], shifts - _CENTRE * scales)
    x = torch.randn(5, 256, generator=generator).bfloat16()
    try:
        got = Int4Linear(matrix, torch.empty(0))(x)
    except (RuntimeError, AttributeError) as error:  # torch's NotImplementedError is a RuntimeError
        problem = str(error).splitlines()[0]
    else:
        want = x.float() @ matrix.dequantised(torch.float32).T
        # Values up to 200, rounded to bfloat16.
        problem = "" if (got.float() - want).abs().max() <= 1.0 else "its products are wrong"
    if problem:
        warnings.warn(f"int4 is not multiplied, but dequantised: {problem}", stacklevel=2)
    return not problem


def _multiply_bytes(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """uint8 [rows, in], 128 for zero -> float32 [rows, out]."""
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


def _in_huge_pages(tensor: Tensor) -> Tensor:
    copy = torch.empty_like(tensor)
    memory.prefer(copy)
    return copy.copy_(tensor)
