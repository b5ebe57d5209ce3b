"""Attention of EAGLE-3's training-time test (arXiv 2503.01840): causal over the first step, one key per later step.

A row of step k, anchored at position t, stands for the k-th token that the drafter adds behind the context that ends
at t. It sees the first step's rows up to t, which have the target's true features, and the rows of the same anchor
at steps 1..k, its own included, which have the drafter's. So in later steps the mask is a causal triangle beside k
diagonals, and is never built: the triangle is ordinary causal attention, and the diagonals are joined to it by their
share of the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unrolled_attention(
    q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, window: int = 0
) -> Tensor:
    """Of the rows of step len(keys) - 1.

    Args:
        q: [B, H, T, D], after rotary embedding; one row per anchor.
        keys, values: of the steps so far, [B, H, T, D] each, the first step's first.
        window: positions that a row sees, its own included; 0: all. A row of step k lies k behind its anchor.

    Returns:
        [B, H, T, D].
    """
    if window and window < q.shape[2] + len(keys) - 1:
        return attention_by_reference(q, keys, values, scale, window)
    if len(keys) == 1:
        return F.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True, scale=scale)
    if q.device.type == "cpu" and _HAS_FLASH:
        own_keys, own_values = torch.stack(keys[1:], dim=3), torch.stack(values[1:], dim=3)
        joined: Tensor = _Joined.apply(q, keys[0], values[0], own_keys, own_values, scale)
        return joined
    return attention_by_reference(q, keys, values, scale)


def attention_by_reference(
    q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, window: int = 0
) -> Tensor:
    """The same with all scores laid out; arguments as in `unrolled_attention`."""
    T = q.shape[2]
    last = len(keys) - 1
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if window:
        causal = causal.triu(last - window + 1)
    scores = (q @ keys[0].transpose(2, 3)) * scale  # [B, H, T, T]
    own = [(q * k).sum(-1, keepdim=True) * scale for k in keys[1:]]  # [B, H, T, 1] each
    if window:
        own = [
            scores_of if last - step < window else torch.full_like(scores_of, -torch.inf)
            for step, scores_of in enumerate(own, start=1)
        ]
    weights = torch.cat((scores.masked_fill(~causal, -torch.inf), *own), dim=-1).softmax(-1)
    out = weights[..., :T] @ values[0]
    for step, v in enumerate(values[1:]):
        out = out + weights[..., T + step, None] * v
    return out


_aten: Any = torch.ops.aten
# Private to torch: what its own SDPA calls on a CPU. Beside the output it gives the logarithm of the softmax's
# denominator, and its backward takes any, so that it can be told of the diagonals' share.
_HAS_FLASH = hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
    _aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
)


class _Joined(torch.autograd.Function):
    """Causal attention over [B, H, T, D], joined with j keys of each row's own, [B, H, T, j, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, scale: float
    ) -> Tensor:
        flash = _aten._scaled_dot_product_flash_attention_for_cpu
        causal, log_sum = flash(q, k, v, 0.0, True, scale=scale)
        own = (q.unsqueeze(3) * own_k).sum(-1).float() * scale  # [B, H, T, j]
        total = torch.logaddexp(log_sum, own.logsumexp(-1))  # [B, H, T]
        weights = (own - total.unsqueeze(-1)).exp()
        out = (log_sum - total).exp().unsqueeze(-1) * causal + (weights.unsqueeze(-1) * own_v).sum(3)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, own_k, own_v, out, total, weights)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, own_k, own_v, out, total, weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        flash = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        # Probabilities are exp(score - total) there as here, so output and total are those of the joined softmax.
        dq, dk, dv = flash(gradient, q, k, v, out, total, 0.0, True, scale=ctx.scale)
        delta = (gradient * out).sum(-1, keepdim=True).float()  # [B, H, T, 1]
        slope = weights * ((gradient.unsqueeze(3) * own_v).sum(-1).float() - delta) * ctx.scale
        slope = slope.unsqueeze(-1).to(q.dtype)  # [B, H, T, j, 1]
        dq = dq + (slope * own_k).sum(3)
        return (
            dq,
            dk,
            dv,
            slope * q.unsqueeze(3),
            weights.unsqueeze(-1).to(q.dtype) * gradient.unsqueeze(3),
            None,
        )
