"""Tree attention over a paged KV cache."""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.attention_plan import AttentionGroup
from outrider.kernels.attention_work import KEYS_PER_TILE, AttentionShape, attention_shape
from outrider.kernels.launch_plans import FP8, TYPE_NAMES, LaunchPlan, kernel_types, launch
from outrider.kernels.shapes import check_kernel_arguments, check_shapes
from outrider.kernels.tree_batch import TreeBatch

HEAD_DIMS = (64, 128)
THREADS = {16: 128, 64: 128, 128: 256}  # by rows per tile; the entries of tree_attention.cu
MERGE_BLOCKS_PER_WAVE = 8  # of four warps; more rows than these are taken in turns


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: TreeBatch,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    value_scale: float = 1.0,
    use_kernel: bool = False,
) -> Tensor:
    """Every query attends to its sequence's committed prefix, its ancestors in the tree, and itself.

    Args:
        q: [NQ, HQ, D], queries after rotary embedding.
        k_pages, v_pages: [P, PAGE, HK, D]; the queries' own rows are already written. HQ = G * HK, and query head
            h reads KV head h // G. They may be of a narrower dtype than q, whose dtype they are turned into row by
            row; the kernel takes float8_e4m3fn.
        batch: the trees.
        scale: factor on q . k, and so the place for what stored keys are multiplied with.
        window: a query sees only keys less than `window` positions behind it; 0 = all. Positions go by depth.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 = off.
        value_scale: factor on the result: what stored values are multiplied with.
        use_kernel: run `tree_attention.cu` (tensors on a GPU); else torch's SDPA over gathered pages.

    Returns:
        [NQ, HQ, D] in the dtype of q.

    Raises:
        ValueError: shapes disagree, or the kernel does not take these tensors; names the argument.
    """
    check_shapes(
        (
            ("q", q, ("NQ", "HQ", "D")),
            ("k_pages", k_pages, ("P", batch.page_size, "HK", "D")),
            ("v_pages", v_pages, ("P", batch.page_size, "HK", "D")),
            ("ancestors", batch.ancestors, ("NQ", "W")),
            ("depths", batch.depths, ("NQ",)),
            ("page_table", batch.page_table, ("B", "max_pages")),
        )
    )
    if q.shape[1] % k_pages.shape[2] != 0:
        raise ValueError(
            f"q has {q.shape[1]} heads, which {k_pages.shape[2]} KV heads of k_pages do not divide"
        )
    if use_kernel:
        if q.dtype not in TYPE_NAMES or q.shape[2] not in HEAD_DIMS:
            kinds = f"{', '.join(str(dtype) for dtype in TYPE_NAMES)} of head size {HEAD_DIMS}"
            raise ValueError(f"q is {q.dtype} of head size {q.shape[2]}, the kernel takes {kinds}")
        stored = FP8 if k_pages.dtype == FP8 else q.dtype
        check_kernel_arguments(
            (
                ("q", q, q.dtype),
                ("k_pages", k_pages, stored),
                ("v_pages", v_pages, stored),
                ("page_table", batch.page_table, torch.int32),
                ("context_lens", batch.context_lens, torch.int32),
                ("tree_lens", batch.tree_lens, torch.int32),
                ("query_indptr", batch.query_indptr, torch.int32),
                ("ancestors", batch.ancestors, torch.int64),
                ("depths", batch.depths, torch.int32),
            )
        )
        if k_pages.stride() != v_pages.stride():
            raise ValueError(f"v_pages has strides {v_pages.stride()}, k_pages has {k_pages.stride()}")
        return tree_attention_op(
            q,
            k_pages,
            v_pages,
            batch.page_table,
            batch.context_lens,
            batch.tree_lens,
            batch.query_indptr,
            batch.ancestors,
            batch.depths,
            list(batch.host_context_lens),
            list(batch.host_tree_lens),
            list(batch.host_query_lens),
            scale,
            window,
            soft_cap,
            value_scale,
        )
    out = _attend_groups(q, k_pages, v_pages, batch, scale, window, soft_cap)
    return out if value_scale == 1.0 else out * value_scale


def _attend_groups(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: TreeBatch, scale: float, window: int, soft_cap: float
) -> Tensor:
    plan = batch.plan
    if plan.single:
        return _attend(q, k_pages, v_pages, plan.groups[0], scale, window, soft_cap)
    out = torch.empty_like(q)
    for group in plan.groups:
        attended = _attend(q, k_pages, v_pages, group, scale, window, soft_cap)
        if group.contiguous:
            out[group.first_query : group.first_query + attended.shape[0]] = attended
        else:
            out.index_copy_(0, group.target_rows, attended.index_select(0, group.output_rows))
    return out


def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    group: AttentionGroup,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    """One group: [n * T, HQ, D], padded rows included."""
    n, T, S = group.num_sequences, group.num_queries, group.num_keys
    _, _, HK, D = k_pages.shape
    G = q.shape[1] // HK
    if not group.contiguous:
        q = q.index_select(0, group.query_rows)
    elif q.shape[0] != n * T:
        q = q[group.first_query : group.first_query + n * T]
    keys = _rows_of(k_pages, group).to(q.dtype).view(n, S, HK, D).transpose(1, 2)  # [n, HK, S, D]
    values = _rows_of(v_pages, group).to(q.dtype).view(n, S, HK, D).transpose(1, 2)
    if group.folded:
        # The G query heads of a KV head become rows of one product, so K and V are read once.
        mask = group.mask(window, G, q.dtype)
        if T == 1:
            folded = q.view(n, HK, G, D)
            return _attention(folded, keys, values, mask, scale, soft_cap).reshape(n, HK * G, D)
        folded = q.view(n, T, HK, G, D).permute(0, 2, 1, 3, 4).reshape(n, HK, T * G, D)
        out = _attention(folded, keys, values, mask, scale, soft_cap)  # [n, HK, T * G, D]
        return out.reshape(n, HK, T, G, D).permute(0, 2, 1, 3, 4).reshape(n * T, HK * G, D)
    # One long chain: KV heads are the batch, its query heads share K and V through a zero stride.
    assert n == 1
    queries = q.view(T, HK, G, D).permute(1, 2, 0, 3)  # [HK, G, T, D]
    expanded = (HK, G, S, D)
    mask = group.mask(window, 1, q.dtype)
    keys, values = keys[0][:, None].expand(expanded), values[0][:, None].expand(expanded)
    out = _attention(queries, keys, values, mask, scale, soft_cap)
    return out.permute(2, 0, 1, 3).reshape(T, HK * G, D)


def _rows_of(pages: Tensor, group: AttentionGroup) -> Tensor:
    """Cache rows of a group, [n * S, HK * D]: a view when they lie back to back."""
    flat = pages.view(pages.shape[0] * pages.shape[1], -1)
    if group.consecutive:
        return flat[group.first_key_row : group.first_key_row + group.num_keys]
    if flat.itemsize == 1:  # torch need not gather FP8, but bytes
        return flat.view(torch.uint8).index_select(0, group.key_rows).view(flat.dtype)
    return flat.index_select(0, group.key_rows)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, soft_cap: float) -> Tensor:
    if soft_cap == 0.0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    scores = torch.tanh(scores / soft_cap) * soft_cap + mask.float()
    return (torch.softmax(scores, dim=-1) @ v.float()).to(q.dtype)


@custom_op("outrider::tree_attention", mutates_args=(), device_types="cpu")
def tree_attention_op(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    tree_lens: Tensor,
    query_indptr: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    host_context_lens: list[int],
    host_tree_lens: list[int],
    host_query_lens: list[int],
    scale: float,
    window: int,
    soft_cap: float,
    value_scale: float,
) -> Tensor:
    """With the batch in parts, which an operator may be given; on a CPU the reference."""
    tensors = (page_table, context_lens, tree_lens, query_indptr, ancestors, depths)
    batch = _tree_batch(k_pages, *tensors, host_context_lens, host_tree_lens, host_query_lens)
    return tree_attention(q, k_pages, v_pages, batch, scale, window, soft_cap, value_scale).contiguous()


@tree_attention_op.register_fake
def _empty(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@tree_attention_op.register_kernel("cuda")
def tree_attention_on_gpu(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> Tensor:
    batch = _tree_batch(k_pages, *rest[:9])
    scale, window, soft_cap, value_scale = rest[9:]
    out = _empty(q)
    num_queries, num_heads, head_dim = q.shape
    if num_queries == 0:
        return out
    num_keys = (c + t for c, t in zip(batch.host_context_lens, batch.host_tree_lens, strict=True))
    shape = attention_shape(
        max(batch.host_query_lens),
        max(num_keys),
        batch.num_sequences,
        num_queries,
        num_heads,
        k_pages.shape[2],
        _num_sms(q.device),
    )
    partial_lse = q.new_empty((shape.num_slots, shape.tile_rows), dtype=torch.float32)
    partial_out = q.new_empty((*partial_lse.shape, head_dim), dtype=torch.float32)
    plans = plan_tree_attention(
        q,
        k_pages,
        v_pages,
        batch,
        scale,
        window,
        soft_cap,
        value_scale,
        shape,
        out,
        partial_out,
        partial_lse,
    )
    launch(q.device, plans)
    return out


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tree_batch(k_pages: Tensor, *rest: Any) -> TreeBatch:
    """From its parts, in the order of the operator's arguments: six tensors and three lists of integers."""
    page_table, context_lens, tree_lens, query_indptr, ancestors, depths, *host_lens = rest
    contexts, trees, queries = (tuple(integers) for integers in host_lens)
    page_size = k_pages.shape[1]
    return TreeBatch(
        page_table,
        context_lens,
        tree_lens,
        query_indptr,
        ancestors,
        depths,
        page_size,
        contexts,
        trees,
        queries,
    )


def shared_bytes(head_dim: int, narrow: bool = False) -> int:
    """Of a block: keys and values of two tiles in 16 bits, and where they lie in the cache.

    Args:
        narrow: the cache is in FP8: two tiles in 8 bits, and one in 16 bits that they are widened to in turns.
    """
    wide = 2 * KEYS_PER_TILE * (head_dim + 8) * 2
    places = 2 * KEYS_PER_TILE * 8
    return places + (wide + 2 * 2 * KEYS_PER_TILE * head_dim if narrow else 2 * wide)


def plan_tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: TreeBatch,
    scale: float,
    window: int,
    soft_cap: float,
    value_scale: float,
    shape: AttentionShape,
    out: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
) -> tuple[LaunchPlan, ...]:
    """One launch, or two when keys may be split.

    Args:
        q, k_pages, v_pages, batch, scale, window, soft_cap, value_scale: as in `tree_attention`.
        out: [NQ, HQ, D] like q, contiguous.
        partial_out: float32 [num_slots, tile_rows, D]; partial_lse: float32 [num_slots, tile_rows].
    """
    num_queries, num_heads, head_dim = q.shape
    num_requests, num_kv_heads = batch.page_table.shape[0], k_pages.shape[2]
    splitting = (np.int32(shape.wave), np.int32(shape.min_split_tiles), np.int32(shape.max_splits))
    name = f"{kernel_types(q.dtype, k_pages.dtype)}_d{head_dim}_rows{shape.tile_rows}"
    attention = LaunchPlan(
        source="tree_attention",
        kernel=f"tree_attention_{name}",
        grid=(shape.num_blocks, 1, 1),
        block=THREADS[shape.tile_rows],
        shared_bytes=shared_bytes(head_dim, k_pages.dtype != q.dtype),
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
            np.int32(num_requests),
            np.int32(num_heads),
            np.int32(num_kv_heads),
            np.int32(batch.page_size),
            np.int32(batch.page_table.shape[1]),
            np.int32(batch.ancestors.shape[1]),
            *splitting,
            np.int32(window),
            np.float32(scale),
            np.float32(soft_cap),
            np.float32(value_scale),
            np.int64(q.stride(0)),
            np.int64(q.stride(1)),
            np.int64(k_pages.stride(0)),
            np.int64(k_pages.stride(1)),
            np.int64(k_pages.stride(2)),
        ),
    )
    if shape.num_slots == 0:
        return (attention,)
    merge = LaunchPlan(
        source="merge_splits",
        kernel=f"merge_splits_{TYPE_NAMES[q.dtype]}",
        grid=(min(-(-num_queries * num_heads // 4), MERGE_BLOCKS_PER_WAVE * shape.wave), 1, 1),
        block=128,
        shared_bytes=0,
        arguments=(
            partial_out,
            partial_lse,
            batch.context_lens,
            batch.tree_lens,
            batch.query_indptr,
            out,
            np.int32(num_requests),
            np.int32(num_heads),
            np.int32(num_kv_heads),
            np.int32(head_dim),
            np.int32(shape.tile_rows),
            *splitting,
            np.int32(window),
        ),
    )
    return attention, merge
