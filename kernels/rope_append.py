"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache."""

from torch import Tensor


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor
) -> Tensor:
    """Rotates q and k by position and writes the rotated k, and v, to their cache slots in place.

    The rotation pairs dimension i with i + D/2 ("rotate half", RoFormer as in GPT-NeoX and Llama).

    Args:
        q: [N, HQ, D]; k, v: [N, HK, D].
        cos, sin: [N, D/2] in the dtype of q.
        slots: int64 [N], slot = page * PAGE + offset; no slot twice.
        k_pages, v_pages: [P, PAGE, HK, D], contiguous.

    Returns:
        [N, HQ, D], the rotated queries.
    """
    num_pages, page_size, HK, D = k_pages.shape
    HQ = q.shape[1]
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, D/2]
    if _adjacent(q, k):
        # Parts of one fused projection are turned in one go.
        rotated = _rotate(q.as_strided((q.shape[0], HQ + HK, D), q.stride()), cos, sin)
        rotated_q, rotated_k = rotated[:, :HQ], rotated[:, HQ:]
    else:
        rotated_q, rotated_k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    k_pages.view(num_pages * page_size, HK, D).index_copy_(0, slots, rotated_k)
    v_pages.view(num_pages * page_size, HK, D).index_copy_(0, slots, v)
    return rotated_q


def _adjacent(q: Tensor, k: Tensor) -> bool:
    """Whether the heads of k follow those of q in memory, row by row."""
    row, head, _ = q.stride()
    behind_q = q.data_ptr() + q.shape[1] * head * q.itemsize
    fits_in_row = row >= (q.shape[1] + k.shape[1]) * head
    return k.stride() == q.stride() and k.data_ptr() == behind_q and fits_in_row


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    out = x.unflatten(-1, (2, -1)) * cos.unsqueeze(-2)  # [N, H, 2, D/2]
    out_first, out_second = out.unbind(-2)
    out_first.addcmul_(second, sin, value=-1)
    out_second.addcmul_(first, sin)
    return out.flatten(-2)
