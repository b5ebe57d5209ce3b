"""Rows of a matrix, packed."""

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.launch_plans import LaunchPlan, launch, operator_of
from outrider.kernels.shapes import check_kernel_arguments, check_shapes


def gather_rows(rows: Tensor, index: Tensor, use_kernel: bool = False) -> Tensor:
    """Rows [N, ...] picked by index int64 [M]: a new tensor [M, ...].

    Raises:
        ValueError: `index` is no vector, or the kernel does not take these tensors; names the argument.
    """
    check_shapes((("index", index, ("M",)),))
    if not use_kernel:
        return rows.index_select(0, index)
    check_kernel_arguments((("rows", rows, rows.dtype), ("index", index, torch.int64)))
    if rows.dim() > 0 and rows[:1].numel() > 0 and not rows[0].is_contiguous():
        raise ValueError(f"rows must be contiguous within a row, got strides {rows.stride()}")
    return gather_rows_op(rows, index)


gather_rows_op = operator_of(gather_rows)


@gather_rows_op.register_kernel("cuda")
def gather_rows_on_gpu(rows: Tensor, index: Tensor) -> Tensor:
    out = _empty(rows, index)
    if out.numel() > 0:
        launch(rows.device, [plan_gather_rows(rows, index, out)])
    return out


@gather_rows_op.register_fake
def _empty(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty((index.shape[0], *rows.shape[1:]))


def plan_gather_rows(rows: Tensor, index: Tensor, out: Tensor) -> LaunchPlan:
    """A block per row, copied in the largest unit of 16, 4 or 2 bytes that divides rows and addresses."""
    row_bytes = out[0].numel() * out.element_size()
    stride_bytes = rows.stride(0) * rows.element_size()
    unit = next(
        u
        for u in (16, 4, 2)
        if not any(x % u for x in (row_bytes, stride_bytes, rows.data_ptr(), out.data_ptr()))
    )
    return LaunchPlan(
        source="gather_rows",
        kernel=f"gather_rows_{unit}",
        grid=(index.shape[0], 1, 1),
        block=256,
        shared_bytes=0,
        arguments=(rows, index, out, np.int32(row_bytes // unit), np.int64(stride_bytes // unit)),
    )
