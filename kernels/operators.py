"""The kernels as torch operators `outrider::...`: what torch.compile traces (by their fake implementations), CUDA
launches, and the CPU answers with the references. The entries (`tree_attention.py` and so on) call them.

Outputs and workspace come from torch's allocator, which a CUDA graph capture redirects to the graph's own memory.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.launch_plans import (
    attention_shape,
    plan_gather_rows,
    plan_kv_commit,
    plan_rope_append,
    plan_sample_shard,
    plan_tree_attention,
)
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.tree_batch import TreeBatch


@cache
def _launcher(device: torch.device):  # type: ignore[no-untyped-def]
    # A machine without a GPU need not have cuda-core.
    from outrider.kernels.launcher import launcher_of

    return launcher_of(device)


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@custom_op("outrider::tree_attention", mutates_args=(), device_types="cuda")
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
) -> Tensor:
    tensors = (page_table, context_lens, tree_lens, query_indptr, ancestors, depths)
    batch = _tree_batch(k_pages, *tensors, host_context_lens, host_tree_lens, host_query_lens)
    num_queries, num_heads, head_dim = q.shape
    out = torch.empty((num_queries, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_queries == 0:
        return out
    max_keys = max(c + t for c, t in zip(host_context_lens, host_tree_lens, strict=True))
    shape = attention_shape(
        max(host_query_lens), max_keys, len(host_query_lens), num_heads, k_pages.shape[2], _num_sms(q.device)
    )
    num_partial = shape.num_splits if shape.num_splits > 1 else 0
    partial_shape = (num_partial, num_queries, num_heads)
    partial_out = torch.empty((*partial_shape, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    plans = plan_tree_attention(
        q, k_pages, v_pages, batch, scale, window, soft_cap, shape, out, partial_out, partial_lse
    )
    _launcher(q.device).launch(plans)
    return out


def _tree_batch(k_pages: Tensor, *rest: Any) -> TreeBatch:
    """From what an operator may be given, in the order of its arguments: six tensors and three lists of integers."""
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


# Of an operator the CPU and the tracer see the arguments as the signature above orders them.


@tree_attention_op.register_kernel("cpu")
def _(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> Tensor:
    from outrider.kernels.tree_attention import attention_by_reference  # which imports this module

    batch, how = _tree_batch(k_pages, *rest[:9]), rest[9:]
    return attention_by_reference(q, k_pages, v_pages, batch, *how).contiguous()


@tree_attention_op.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("outrider::rope_append", mutates_args=("k_pages", "v_pages"), device_types="cuda")
def rope_append_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    q_rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] > 0:
        _launcher(q.device).launch(
            [plan_rope_append(q, k, v, cos, sin, kv_rows, k_pages, v_pages, q_rotated)]
        )
    return q_rotated


@rope_append_op.register_kernel("cpu")
def _(*arguments: Any) -> Tensor:
    from outrider.kernels.rope_append import rope_append_by_reference

    return rope_append_by_reference(*arguments).contiguous()


@rope_append_op.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("outrider::kv_commit", mutates_args=("kv",), device_types="cuda")
def kv_commit_op(kv: Tensor, source_rows: Tensor, target_rows: Tensor) -> None:
    if source_rows.shape[0] > 0:
        _launcher(kv.device).launch([plan_kv_commit(kv, source_rows, target_rows)])


@kv_commit_op.register_kernel("cpu")
def _(kv: Tensor, source_rows: Tensor, target_rows: Tensor) -> None:
    from outrider.kernels.kv_commit import kv_commit_by_reference

    kv_commit_by_reference(kv, source_rows, target_rows)


@kv_commit_op.register_fake
def _(kv: Tensor, source_rows: Tensor, target_rows: Tensor) -> None:
    return None


@custom_op("outrider::gather_rows", mutates_args=(), device_types="cuda")
def gather_rows_op(rows: Tensor, index: Tensor) -> Tensor:
    out = torch.empty((index.shape[0], *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    if out.numel() > 0:
        _launcher(rows.device).launch([plan_gather_rows(rows, index, out)])
    return out


@gather_rows_op.register_kernel("cpu")
def _(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index)


@gather_rows_op.register_fake
def _(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty((index.shape[0], *rows.shape[1:]))


@custom_op("outrider::sample_shard", mutates_args=(), device_types="cuda")
def sample_shard_op(
    logits: Tensor, temperatures: Tensor, keys: Tensor, vocab_offset: int, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, device = logits.shape[0], logits.device
    scores, largest, sums = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3))
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    plan = plan_sample_shard(logits, temperatures, keys, vocab_offset, table, scores, tokens, largest, sums)
    if num_rows > 0:
        _launcher(device).launch([plan])
    return scores, tokens, largest, sums


@sample_shard_op.register_kernel("cpu")
def _(
    logits: Tensor, temperatures: Tensor, keys: Tensor, vocab_offset: int, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from outrider.kernels.sample_shard import sample_shard_by_reference

    halves = [(first, second) for first, second in keys.tolist()]
    ids = ShardIds(table) if len(table) else ShardIds.from_first(vocab_offset, logits.shape[1])
    sample = sample_shard_by_reference(logits, temperatures.tolist(), halves, ids)
    return sample.values, sample.ids, sample.maxima, sample.exp_sums.float()


@sample_shard_op.register_fake
def _(
    logits: Tensor, temperatures: Tensor, keys: Tensor, vocab_offset: int, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (logits.shape[0],)
    floats = [logits.new_empty(rows) for _ in range(3)]
    return floats[0], logits.new_empty(rows, dtype=torch.int64), floats[1], floats[2]
