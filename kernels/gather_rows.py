"""Rows of a matrix, packed."""

import torch
from torch import Tensor

from outrider.kernels.operators import gather_rows_op
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
