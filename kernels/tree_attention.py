"""Tree attention over a paged KV cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.attention_plan import AttentionGroup
from outrider.kernels.launch_plans import HEAD_DIMS, TYPE_NAMES
from outrider.kernels.operators import tree_attention_op
from outrider.kernels.shapes import check_kernel_arguments, check_shapes
from outrider.kernels.tree_batch import TreeBatch


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: TreeBatch,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    use_kernel: bool = False,
) -> Tensor:
    """Every query attends to its sequence's committed prefix, its ancestors in the tree, and itself.

    Args:
        q: [NQ, HQ, D], queries after rotary embedding.
        k_pages, v_pages: [P, PAGE, HK, D]; the queries' own rows are already written. HQ = G * HK, and query head
            h reads KV head h // G.
        batch: the trees.
        scale: factor on q . k.
        window: a query sees only keys less than `window` positions behind it; 0 = all. Positions go by depth.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 = off.
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
    if not use_kernel:
        return attention_by_reference(q, k_pages, v_pages, batch, scale, window, soft_cap)
    if q.dtype not in TYPE_NAMES or q.shape[2] not in HEAD_DIMS:
        kinds = f"{', '.join(str(dtype) for dtype in TYPE_NAMES)} of head size {HEAD_DIMS}"
        raise ValueError(f"q is {q.dtype} of head size {q.shape[2]}, the kernel takes {kinds}")
    check_kernel_arguments(
        (
            ("q", q, q.dtype),
            ("k_pages", k_pages, q.dtype),
            ("v_pages", v_pages, q.dtype),
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
    )


def attention_by_reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: TreeBatch, scale: float, window: int, soft_cap: float
) -> Tensor:
    """The CPU path, and on a GPU the fallback: SDPA over gathered pages. Arguments as in `tree_attention`."""
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
    keys = _rows_of(k_pages, group).view(n, S, HK, D).transpose(1, 2)  # [n, HK, S, D]
    values = _rows_of(v_pages, group).view(n, S, HK, D).transpose(1, 2)
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
    return flat.index_select(0, group.key_rows)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, soft_cap: float) -> Tensor:
    if soft_cap == 0.0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    scores = torch.tanh(scores / soft_cap) * soft_cap + mask.float()
    return (torch.softmax(scores, dim=-1) @ v.float()).to(q.dtype)
