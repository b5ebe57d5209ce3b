"""Rows rounded to FP8, for products with matrices in FP8."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.launch_plans import FP8, PACKED_TYPES, LaunchPlan, are_packs, launch
from outrider.kernels.shapes import check_kernel_arguments, check_shapes

FP8_MAX = torch.finfo(FP8).max
ROWS_BY_COLUMN = 4  # rows with scales column by column come in as many: torch reads these 16 bytes at a time
THREADS = 256
BLOCKS = 256  # few rows are cut into parts, so that as many blocks work
_PACK_BYTES = 16
_WARP = 32


def round_rows(
    x: Tensor,
    width: int,
    bound: float,
    least_scale: float,
    static_scale: float | None,
    by_column: bool,
    use_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows as FP8 with their scales, computed in float32; value = FP8 number * scale.

    A row's numbers depend on nothing but the row, so that they are the same alone and among others. A NaN makes NaN
    of all that share its scale; its sign is not promised.

    Args:
        x: [N, columns]; the kernel takes bfloat16, float16 and float32.
        width: columns that share a scale, from the first on; the last ones of a row may be fewer.
        bound: greatest magnitude that a scale covers; what is above it is cut to it.
        least_scale: smallest scale.
        static_scale: the scale of all rows; then `width` is all columns, and bound and least scale do not count.
            None: scales follow from the rows.
        by_column: for torch's product with scales by group, in which a group's scales lie side by side; rows of zeros
            are put behind the others, up to a multiple of `ROWS_BY_COLUMN`.
        use_kernel: run `round_rows.cu` (tensors on a GPU).

    Returns:
        float8_e4m3fn [N, columns]; float32 [N, G], G = ceil(columns / width), contiguous or with strides (1, N).

    Raises:
        ValueError: `x` is no matrix, `width` does not fit, or the kernel does not take these rows.
    """
    check_shapes((("x", x, ("N", "columns")),))
    columns = x.shape[1]
    if not 1 <= width <= columns or (static_scale is not None and width < columns):
        which = "all" if static_scale is not None else "from 1 to all"
        raise ValueError(f"width must be {which} of x's {columns} columns, got {width}")
    if use_kernel:
        if x.dtype not in PACKED_TYPES:
            raise ValueError(f"x is {x.dtype}, the kernel takes {', '.join(map(str, PACKED_TYPES))}")
        check_kernel_arguments((("x", x, x.dtype),))
        values, scales = round_rows_op(x, width, bound, least_scale, static_scale, by_column)
        return values, scales
    if by_column:
        x = F.pad(x, (0, 0, 0, -len(x) % ROWS_BY_COLUMN))
    groups = x.float()
    if columns % width:  # columns of zeros fill the last group up
        groups = F.pad(groups, (0, -columns % width))
    groups = groups.unflatten(1, (-1, width))
    if static_scale is not None:
        scales = groups.new_full((len(x), 1), static_scale)
    else:
        largest = groups.abs().amax(-1).clamp(max=bound)
        # By a tensor: of a division by a number torch makes, on a GPU, a product with its rounded inverse.
        scales = (largest / largest.new_full((), FP8_MAX)).clamp(min=least_scale)
    scaled = (groups / scales[:, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return scaled.flatten(1)[:, :columns].to(FP8), scales.t().contiguous().t() if by_column else scales


@custom_op("outrider::round_rows", mutates_args=(), device_types="cpu")
def round_rows_op(
    x: Tensor, width: int, bound: float, least_scale: float, static_scale: float | None, by_column: bool
) -> tuple[Tensor, Tensor]:
    """On a CPU the reference. All arguments must be given, see `launch_plans.operator_of`."""
    return round_rows(x, width, bound, least_scale, static_scale, by_column)


@round_rows_op.register_fake
def _empty(
    x: Tensor, width: int, bound: float, least_scale: float, static_scale: float | None, by_column: bool
) -> tuple[Tensor, Tensor]:
    num_rows, columns = x.shape
    num_rows += -num_rows % ROWS_BY_COLUMN if by_column else 0
    num_groups = -(-columns // width)
    values = x.new_empty((num_rows, columns), dtype=FP8)
    strides = (1, num_rows) if by_column else (num_groups, 1)
    return values, x.new_empty_strided((num_rows, num_groups), strides, dtype=torch.float32)


@round_rows_op.register_kernel("cuda")
def round_rows_on_gpu(
    x: Tensor, width: int, bound: float, least_scale: float, static_scale: float | None, by_column: bool
) -> tuple[Tensor, Tensor]:
    outputs = _empty(x, width, bound, least_scale, static_scale, by_column)
    if x.numel() > 0:
        launch(x.device, [plan_round_rows(x, width, bound, least_scale, static_scale, *outputs)])
    return outputs


def plan_round_rows(
    x: Tensor,
    width: int,
    bound: float,
    least_scale: float,
    static_scale: float | None,
    values: Tensor,
    scales: Tensor,
) -> LaunchPlan:
    """A block for each row, or several; or as many lanes of a warp for a group as it has packs.

    `values` [N, columns], contiguous, and `scales` [N, G] are the outputs, with or without rows of zeros behind those
    of `x`; the others as in the entry.
    """
    (num_rows, columns), (num_outputs, num_groups) = x.shape, scales.shape
    pack = _PACK_BYTES // x.element_size()
    aligned = are_packs(x) and columns % pack == 0 and values.data_ptr() % pack == 0
    rows = (x, values, scales, np.int32(num_rows), np.int32(columns), np.int64(x.stride(0)))
    limits = (np.float32(bound), np.float32(least_scale))
    if num_groups == 1:
        num_parts = min(-(-columns // (pack * THREADS)), max(1, BLOCKS // num_outputs))
        return LaunchPlan(
            source="round_rows",
            kernel=f"round_rows_{PACKED_TYPES[x.dtype]}",
            grid=(num_outputs, num_parts, 1),
            block=THREADS,
            shared_bytes=4 * THREADS // _WARP,  # the largest of each warp
            arguments=(
                *rows,
                *limits,
                np.float32(0.0 if static_scale is None else static_scale),
                np.int32(static_scale is not None),
                np.int32(aligned),
            ),
        )
    lanes = min(_WARP, 1 << (-(-width // pack) - 1).bit_length())
    return LaunchPlan(
        source="round_rows",
        kernel=f"round_rows_{PACKED_TYPES[x.dtype]}_groups",
        grid=(num_outputs, -(-num_groups * lanes // THREADS), 1),
        block=THREADS,
        shared_bytes=0,
        arguments=(
            *rows,
            *limits,
            np.int32(width),
            np.int32(num_groups),
            np.int32(lanes),
            np.int64(scales.stride(0)),
            np.int64(scales.stride(1)),
            np.int32(aligned and width % pack == 0),
        ),
    )
