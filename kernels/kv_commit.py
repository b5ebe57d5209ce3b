"""Commit of an accepted path: its cache rows move down to directly behind the committed prefix."""

import torch
from torch import Tensor

from outrider.kernels.launch_plans import MAX_COMMIT_ROWS
from outrider.kernels.operators import kv_commit_op
from outrider.kernels.shapes import check_kernel_arguments, check_shapes


def kv_commit(kv: Tensor, source_rows: Tensor, target_rows: Tensor, use_kernel: bool = False) -> None:
    """Copies cache rows of all layers in place; sources are read before any target is written.

    Args:
        kv: [L, 2, P, PAGE, HK, D], keys and values of all layers, contiguous.
        source_rows, target_rows: int64 [M], row = page * PAGE + offset; no target twice. The kernel takes a pair
            with a negative row as padding.

    Raises:
        ValueError: shapes disagree, or the kernel does not take these tensors; names the argument.
    """
    named = (("source_rows", source_rows, ("M",)), ("target_rows", target_rows, ("M",)))
    check_shapes((("kv", kv, ("L", 2, "P", "PAGE", "HK", "D")), *named))
    if not use_kernel:
        kv_commit_by_reference(kv, source_rows, target_rows)
        return
    arguments = (("source_rows", source_rows, torch.int64), ("target_rows", target_rows, torch.int64))
    check_kernel_arguments((("kv", kv, kv.dtype), *arguments))
    row_bytes = kv.shape[4] * kv.shape[5] * kv.element_size()
    if not kv.is_contiguous() or row_bytes % 16 != 0:
        raise ValueError(
            f"kv must be contiguous with rows of a multiple of 16 bytes, got rows of {row_bytes}"
        )
    if source_rows.shape[0] > MAX_COMMIT_ROWS:
        raise ValueError(f"source_rows has {source_rows.shape[0]} rows, the kernel takes {MAX_COMMIT_ROWS}")
    kv_commit_op(kv, source_rows, target_rows)


def kv_commit_by_reference(kv: Tensor, source_rows: Tensor, target_rows: Tensor) -> None:
    """The CPU path; arguments as in `kv_commit`."""
    if source_rows.numel() == 0:
        return
    L, two, P, PAGE, HK, D = kv.shape
    rows = kv.view(L * two, P * PAGE, HK * D)
    rows.index_copy_(1, target_rows, rows.index_select(1, source_rows))
