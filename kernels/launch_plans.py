"""What to launch: pure functions from tensors to grid, block, shared memory and arguments.

Nothing here needs a GPU, so the plans that run on one are the plans that tests execute on a CPU. The functions
allocate nothing: the caller passes outputs and workspace.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.tree_batch import TreeBatch

Argument = Tensor | np.int32 | np.int64 | np.float32

TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
HEAD_DIMS = (64, 128)
KEYS_PER_TILE = {16: 64, 64: 32, 128: 32}  # by rows per tile; the entries of tree_attention.cu
THREADS = {16: 128, 64: 128, 128: 256}
MAX_SPLITS = 32
MIN_KEYS_PER_SPLIT = 256
COMMIT_SHARED_BYTES = 96 << 10  # what every target can give a block
MAX_COMMIT_ROWS = COMMIT_SHARED_BYTES // 16


@dataclass(frozen=True)
class LaunchPlan:
    """One kernel launch.

    Attributes:
        source: stem of the `.cu` file.
        kernel: name of the entry in it.
        grid: blocks in x, y, z.
        block: threads in a block.
        shared_bytes: dynamic shared memory of a block.
        arguments: tensors (passed by address) and numpy scalars (which fix the width).
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class AttentionShape:
    """The choices of tree_attention that depend on the batch. For a captured CUDA graph they are made once, for
    the capacity: surplus blocks return at once.

    Attributes:
        tile_rows: 16, 64 or 128 (node, head) pairs in a block.
        num_row_tiles: blocks over the rows of the largest request.
        num_splits: parts the keys are divided into; with 1 the result is written directly.
    """

    tile_rows: int
    num_row_tiles: int
    num_splits: int


def attention_shape(
    max_query_len: int, max_keys: int, batch_size: int, num_heads: int, num_kv_heads: int, num_sms: int
) -> AttentionShape:
    """Tiles by rows; splits until the GPU has two blocks per multiprocessor, but few: a split's partial results
    in f32 are written and read once more, and must not cost more than the keys and values themselves."""
    rows = max_query_len * (num_heads // num_kv_heads)
    tile_rows = 16 if rows <= 16 else 64 if rows <= 64 else 128
    num_row_tiles = -(-rows // tile_rows)
    blocks = max(1, num_row_tiles * num_kv_heads * batch_size)
    wanted = -(-2 * num_sms // blocks)
    affordable = min(max_keys // MIN_KEYS_PER_SPLIT, max_keys // (2 * max(rows, 1)))
    return AttentionShape(tile_rows, num_row_tiles, max(1, min(wanted, affordable, MAX_SPLITS)))


def plan_tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: TreeBatch,
    scale: float,
    window: int,
    soft_cap: float,
    shape: AttentionShape,
    out: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
) -> tuple[LaunchPlan, ...]:
    """One launch, or two when the keys are split.

    Args:
        q, k_pages, v_pages, batch, scale, window, soft_cap: as in `tree_attention`.
        out: [NQ, HQ, D] like q, contiguous.
        partial_out: float32 [num_splits, NQ, HQ, D]; partial_lse: float32 [num_splits, NQ, HQ]. Unused, and may be
            empty, with one split.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    name = f"{TYPE_NAMES[q.dtype]}_d{head_dim}_rows{shape.tile_rows}"
    attention = LaunchPlan(
        source="tree_attention",
        kernel=f"tree_attention_{name}",
        grid=(shape.num_row_tiles, num_kv_heads * shape.num_splits, batch.page_table.shape[0]),
        block=THREADS[shape.tile_rows],
        shared_bytes=2 * 2 * KEYS_PER_TILE[shape.tile_rows] * (head_dim + 8) * q.element_size(),
        arguments=(
            q,
            k_pages,
            v_pages,
            batch.page_table,
            batch.context_lens,
            batch.tree_lens,
            batch.query_indptr,
            batch.ancestors,
            batch.depths,
            out,
            partial_out,
            partial_lse,
            np.int32(num_queries),
            np.int32(num_heads),
            np.int32(num_kv_heads),
            np.int32(batch.page_size),
            np.int32(batch.page_table.shape[1]),
            np.int32(batch.ancestors.shape[1]),
            np.int32(shape.num_splits),
            np.int32(window),
            np.float32(scale),
            np.float32(soft_cap),
            np.int64(q.stride(0)),
            np.int64(q.stride(1)),
            np.int64(k_pages.stride(0)),
            np.int64(k_pages.stride(1)),
            np.int64(k_pages.stride(2)),
        ),
    )
    if shape.num_splits == 1:
        return (attention,)
    num_rows = num_queries * num_heads
    merge = LaunchPlan(
        source="merge_splits",
        kernel=f"merge_splits_{TYPE_NAMES[q.dtype]}",
        grid=(-(-num_rows // 4), 1, 1),  # a warp per row
        block=128,
        shared_bytes=0,
        arguments=(
            partial_out,
            partial_lse,
            out,
            np.int32(num_rows),
            np.int32(head_dim),
            np.int32(shape.num_splits),
        ),
    )
    return attention, merge


def plan_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_rotated: Tensor,
) -> LaunchPlan:
    """A block per node. `q_rotated` [N, HQ, D] is the output; the others as in `rope_append`."""
    num_nodes, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    return LaunchPlan(
        source="rope_append",
        kernel=f"rope_append_{TYPE_NAMES[q.dtype]}",
        grid=(num_nodes, 1, 1),
        block=256,
        shared_bytes=0,
        arguments=(
            q,
            k,
            v,
            cos,
            sin,
            kv_rows,
            q_rotated,
            k_pages,
            v_pages,
            np.int32(num_heads),
            np.int32(num_kv_heads),
            np.int32(head_dim),
            np.int32(k_pages.shape[1]),
            np.int64(q.stride(0)),
            np.int64(k.stride(0)),
            np.int64(v.stride(0)),
            np.int64(cos.stride(0)),
            np.int64(k_pages.stride(0)),
            np.int64(k_pages.stride(1)),
            np.int64(k_pages.stride(2)),
        ),
    )


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


def plan_sample_shard(
    logits: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    vocab_offset: int,
    table: Tensor,
    scores: Tensor,
    tokens: Tensor,
    largest: Tensor,
    exponential_sums: Tensor,
) -> LaunchPlan:
    """A block per row.

    Args:
        logits: float32 [num_rows, shard_size]; temperatures: float32 [num_rows], 0 = no noise; keys: int64
            [num_rows, 2], the halves of `noise_key`; vocab_offset: token id of column 0; table: int64
            [shard_size], the token id of each column, ascending, or no elements where they are consecutive.
        scores, tokens, largest, exponential_sums: outputs float32, int64, float32, float32 [num_rows].
    """
    num_rows, vocab_size = logits.shape
    return LaunchPlan(
        source="sample_shard",
        kernel="sample_shard",
        grid=(num_rows, 1, 1),
        block=512,
        shared_bytes=16 * (16 + 4 + 4),  # of each of 16 warps: (score, token), largest, sum
        arguments=(
            logits,
            keys,
            temperatures,
            table if len(table) else np.int64(0),
            scores,
            tokens,
            largest,
            exponential_sums,
            np.int32(vocab_size),
            np.int64(vocab_offset),
            np.int64(logits.stride(0)),
        ),
    )


def plan_gather_rows(rows: Tensor, indices: Tensor, out: Tensor) -> LaunchPlan:
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
        grid=(indices.shape[0], 1, 1),
        block=256,
        shared_bytes=0,
        arguments=(rows, indices, out, np.int32(row_bytes // unit), np.int64(stride_bytes // unit)),
    )
