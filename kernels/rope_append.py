"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.launch_plans import FP8, TYPE_NAMES, LaunchPlan, kernel_types, launch, operator_of
from outrider.kernels.shapes import check_kernel_arguments, check_shapes

FP8_MAX = torch.finfo(FP8).max


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    use_kernel: bool = False,
) -> Tensor:
    """Rotates q and k by position and writes the rotated k, and v, to their cache rows in place.

    The rotation pairs dimension i with i + D/2 ("rotate half", RoFormer as in GPT-NeoX and Llama).

    Args:
        q: [N, HQ, D]; k, v: [N, HK, D].
        cos, sin: [N, D/2] in the dtype of q.
        kv_rows: int64 [N], row = page * PAGE + offset; no row twice. The kernel takes a negative one as padding.
        k_pages, v_pages: [P, PAGE, HK, D], contiguous; in the dtype of q, or in float8_e4m3fn: rows in the dtype of q
            are then divided by the scale, cut off at 448 and rounded.
        key_scale, value_scale: of rows in FP8.

    Returns:
        [N, HQ, D], the rotated queries.

    Raises:
        ValueError: shapes disagree, or the kernel does not take these tensors; names the argument.
    """
    half = q.shape[-1] // 2
    check_shapes(
        (
            ("q", q, ("N", "HQ", "D")),
            ("k", k, ("N", "HK", "D")),
            ("v", v, ("N", "HK", "D")),
            ("cos", cos, ("N", half)),
            ("sin", sin, ("N", half)),
            ("kv_rows", kv_rows, ("N",)),
            ("k_pages", k_pages, ("P", "PAGE", "HK", "D")),
            ("v_pages", v_pages, ("P", "PAGE", "HK", "D")),
        )
    )
    if use_kernel:
        if q.dtype not in TYPE_NAMES:
            raise ValueError(
                f"q is {q.dtype}, the kernel takes {', '.join(str(dtype) for dtype in TYPE_NAMES)}"
            )
        stored = FP8 if k_pages.dtype == FP8 else q.dtype
        named = (("q", q), ("k", k), ("v", v), ("cos", cos), ("sin", sin))
        check_kernel_arguments(
            (
                *((name, tensor, q.dtype) for name, tensor in named),
                ("kv_rows", kv_rows, torch.int64),
                ("k_pages", k_pages, stored),
                ("v_pages", v_pages, stored),
            )
        )
        for name, tensor in named[:3]:
            if tensor.stride(1) != tensor.shape[2]:
                raise ValueError(f"{name} must have its heads side by side, got strides {tensor.stride()}")
        return rope_append_op(q, k, v, cos, sin, kv_rows, k_pages, v_pages, key_scale, value_scale)
    HQ, HK, D = q.shape[1], *k_pages.shape[2:]
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, D/2]
    if _adjacent(q, k):
        # Parts of one fused projection are turned in one go.
        rotated = _rotate(q.as_strided((q.shape[0], HQ + HK, D), q.stride()), cos, sin)
        rotated_q, rotated_k = rotated[:, :HQ], rotated[:, HQ:]
    else:
        rotated_q, rotated_k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    _write(k_pages, rotated_k, key_scale, kv_rows)
    _write(v_pages, v, value_scale, kv_rows)
    return rotated_q


def _write(pages: Tensor, rows: Tensor, scale: float, kv_rows: Tensor) -> None:
    places = pages.view(-1, *pages.shape[2:])
    if pages.dtype == FP8:  # torch need not move FP8, but bytes
        places.view(torch.uint8).index_copy_(0, kv_rows, round_to_fp8(rows, scale).view(torch.uint8))
    else:
        places.index_copy_(0, kv_rows, rows)


def round_to_fp8(rows: Tensor, scale: float) -> Tensor:
    """float8_e4m3fn: rows over a scale, to the nearest, ties to even; what is beyond the largest becomes it."""
    return (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


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


rope_append_op = operator_of(rope_append, mutates=("k_pages", "v_pages"))


@rope_append_op.register_kernel("cuda")
def rope_append_on_gpu(q: Tensor, *rest: Any) -> Tensor:
    q_rotated = _empty(q)
    if q.shape[0] > 0:
        arguments = (q, *rest, q_rotated)
        launch(q.device, [plan_rope_append(*arguments)])
    return q_rotated


@rope_append_op.register_fake
def _empty(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def plan_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    key_scale: float,
    value_scale: float,
    q_rotated: Tensor,
) -> LaunchPlan:
    """A block per node. `q_rotated` [N, HQ, D] is the output; the others as in `rope_append`."""
    num_nodes, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    return LaunchPlan(
        source="rope_append",
        kernel=f"rope_append_{kernel_types(q.dtype, k_pages.dtype)}",
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
            np.float32(key_scale),
            np.float32(value_scale),
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
