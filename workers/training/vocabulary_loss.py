"""A loss over a whole vocabulary that never holds [N, V'] logits: rows in pieces, gradients made on the way.

The idea is that of fused linear cross-entropy (Liger Kernel, arXiv 2410.10989): a scalar loss knows its own gradient,
so each piece of logits is made once, turned into its gradient in place, multiplied out, and forgotten. Here for any
loss of `losses.py`. With G = dL/d log q in the k tokens and the rest r, and the softmax's own derivative,

    dL/dlogit_j = G_j - q_j sum(G)             for the k tokens,
                  q_j (G_r / q_r - sum(G))     for every other one,

a multiple of q with k corrections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.workers.training.losses import LOSSES, acceptance, with_rest

# Elements of a piece of logits: small enough to stay near the processor, large enough for its products.
_PIECE_ELEMENTS = 1 << 24
_LEAST_REST = 1e-7


@dataclass(frozen=True)
class SoftTargets:
    """The target's law at some rows, over the ids of a head.

    Attributes:
        columns: int64 [N, k], its likeliest tokens as columns of the head, the likeliest first.
        log_probs: float32 [N, k], theirs.
    """

    columns: Tensor
    log_probs: Tensor

    def at(self, rows: Tensor) -> SoftTargets:
        """Of these rows, int64 [M]."""
        return SoftTargets(self.columns[rows], self.log_probs[rows])


def vocabulary_loss(
    rows: Tensor, matrix: Tensor, targets: SoftTargets, weights: Tensor, loss: str
) -> tuple[Tensor, Tensor]:
    """Sum over rows of weight * loss of softmax(rows @ matrix.T) against the targets.

    Args:
        rows: [N, r] of any float dtype, in which the products run.
        matrix: [V', r], cast to it.
        weights: float32 [N].
        loss: a name in `LOSSES`.

    Returns:
        (the loss, float32 scalar with gradients to rows and matrix; acceptance of each row, float32 [N]).
    """
    value, accepted = _VocabularyLoss.apply(
        rows, matrix.to(rows.dtype), targets.columns, targets.log_probs, weights, loss
    )
    return value, accepted


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, matrix: Tensor, columns: Tensor, log_p: Tensor, weights: Tensor, loss: str
    ) -> tuple[Tensor, Tensor]:
        wants_rows, wants_matrix = ctx.needs_input_grad[:2]
        row_gradient = torch.empty_like(rows) if wants_rows else None
        matrix_gradient = (
            torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device) if wants_matrix else None
        )
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        accepted = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        per_piece = max(1, _PIECE_ELEMENTS // len(matrix))
        for start in range(0, len(rows), per_piece):
            part = slice(start, start + per_piece)
            logits = rows[part] @ matrix.T
            value, accepted[part] = _to_gradient(logits, columns[part], log_p[part], weights[part], loss)
            total += value
            if row_gradient is not None:
                row_gradient[part] = logits @ matrix
            if matrix_gradient is not None:
                matrix_gradient += logits.T @ rows[part]
        ctx.gradients = (row_gradient, matrix_gradient, matrix.dtype)
        ctx.mark_non_differentiable(accepted)
        return total, accepted

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        row_gradient, matrix_gradient, dtype = ctx.gradients
        scale = gradients[0]
        return (
            None if row_gradient is None else row_gradient * scale.to(row_gradient.dtype),
            None if matrix_gradient is None else (matrix_gradient * scale).to(dtype),
            None,
            None,
            None,
            None,
        )


def _to_gradient(
    logits: Tensor, columns: Tensor, log_p: Tensor, weights: Tensor, loss: str
) -> tuple[Tensor, Tensor]:
    """Overwrites logits [n, V'] with the gradient of their weighted loss; the loss, and acceptances [n]."""
    chosen = logits.gather(1, columns).float()
    highest = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(highest).exp_()  # [n, V'], in place
    normaliser = exponentials.sum(1, keepdim=True, dtype=torch.float32)
    log_q = chosen - highest.float() - normaliser.log()
    q_rest = (1.0 - log_q.exp().sum(1, keepdim=True)).clamp(min=_LEAST_REST)
    with torch.enable_grad():
        parts = torch.cat((log_q, q_rest.log()), dim=1).requires_grad_()
        p = with_rest(log_p)
        value = (weights * LOSSES[loss](p, parts)).sum()
        (slope,) = torch.autograd.grad(value, parts)  # G, [n, k + 1]
    rest_slope = slope[:, -1:] / q_rest
    exponentials.mul_(((rest_slope - slope.sum(1, keepdim=True)) / normaliser).to(logits.dtype))
    corrections = slope[:, :-1] - log_q.exp() * rest_slope
    exponentials.scatter_add_(1, columns, corrections.to(logits.dtype))
    return value.detach(), acceptance(p, parts.detach())
