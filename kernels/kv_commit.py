"""Commit of an accepted path: its cache rows move down to directly behind the committed prefix."""

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.launch_plans import (
    COMMIT_SHARED_BYTES,
    MAX_COMMIT_ROWS,
    LaunchPlan,
    launch,
    operator_of,
)
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
    if use_kernel:
        arguments = (("source_rows", source_rows, torch.int64), ("target_rows", target_rows, torch.int64))
        check_kernel_arguments((("kv", kv, kv.dtype), *arguments))
        row_bytes = kv.shape[4] * kv.shape[5] * kv.element_size()
        if not kv.is_contiguous() or row_bytes % 16 != 0:
            raise ValueError(
                f"kv must be contiguous with rows of a multiple of 16 bytes, got rows of {row_bytes}"
            )
        if source_rows.shape[0] > MAX_COMMIT_ROWS:
            raise ValueError(
                f"source_rows has {source_rows.shape[0]} rows, the kernel takes {MAX_COMMIT_ROWS}"
            )
        kv_commit_op(kv, source_rows, target_rows)
        return
    if source_rows.numel() == 0:
        return
    L, two, P, PAGE, HK, D = kv.shape
    rows = kv.view(L * two, P * PAGE, HK * D)
    rows.index_copy_(1, target_rows, rows.index_select(1, source_rows))


kv_commit_op = operator_of(kv_commit, mutates=("kv",))


@kv_commit_op.register_kernel("cuda")
def kv_commit_on_gpu(kv: Tensor, *rows: Tensor) -> None:
    if rows[0].shape[0] > 0:
        launch(kv.device, [plan_kv_commit(kv, *rows)])


@kv_commit_op.register_fake
def _(*arguments: Tensor) -> None:
    return None


def plan_kv_commit(kv: Tensor, source_rows: Tensor, target_rows: Tensor) -> LaunchPlan:
    """A block per layer, K or V, and group of columns: 64 bytes wide, less when many rows are to be staged."""
    num_layers, _, num_pages, page_size, num_kv_heads, head_dim = kv.shape
    num_rows = source_rows.shape[0]
    row_bytes = num_kv_heads * head_dim * kv.element_size()
    block_chunks = 4
    while num_rows * block_chunks * 16 > COMMIT_SHARED_BYTES:
        block_chunks //= 2
    assert block_chunks > 0, f"{num_rows} rows; the caller lets at most {MAX_COMMIT_ROWS} through"
    return LaunchPlan(
        source="kv_commit",
        kernel="kv_commit",
        grid=(-(-row_bytes // (16 * block_chunks)), 2 * num_layers, 1),
        block=256,
        shared_bytes=num_rows * block_chunks * 16,
        arguments=(
            kv,
            source_rows,
            target_rows,
            np.int32(num_rows),
            np.int64(num_pages * page_size * row_bytes),
            np.int32(row_bytes),
            np.int32(block_chunks),
        ),
    )
