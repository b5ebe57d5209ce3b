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

# Elements of a piece of logits: on a CPU few enough to stay near the processor, many enough for its products; on a
# GPU enough to fill it.
_PIECE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
_LEAST_REST = 1e-7
_WIDTH = 16


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
    rows: Tensor, matrix: Tensor, targets: SoftTargets, weights: Tensor, loss: str, num_fixed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows of weight * loss of softmax(rows @ matrix.T) against the targets.

    Args:
        rows: [N, r] of any float dtype, in which the products run.
        matrix: [V', r], cast to it.
        weights: float32 [N].
        loss: a name in `LOSSES`.
        num_fixed: columns at the front of the matrix that nobody trains; their gradient is zero.

    Returns:
        (the loss, float32 scalar with gradients to rows and matrix; of each row loss and acceptance, float32 [N]).
    """
    value, losses, accepted = _VocabularyLoss.apply(
        rows, matrix.to(rows.dtype), targets.columns, targets.log_probs, weights, loss, num_fixed
    )
    return value, losses, accepted


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        matrix: Tensor,
        columns: Tensor,
        log_p: Tensor,
        weights: Tensor,
        loss: str,
        num_fixed: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_rows, wants_matrix = ctx.needs_input_grad[:2]
        row_gradient = torch.empty_like(rows) if wants_rows else None
        matrix_gradient = torch.zeros_like(matrix, dtype=torch.float32) if wants_matrix else None
        losses, accepted = torch.empty(2, len(rows), dtype=torch.float32, device=rows.device)
        per_piece = max(1, _PIECE_ELEMENTS[rows.device.type] // len(matrix))
        # A column of ones beside the matrix: the product that shifts logits, and the one that adds them up.
        widened = _widened(matrix, matrix.new_ones(len(matrix)))
        for start in range(0, len(rows), per_piece):
            part = slice(start, start + per_piece)
            piece = _Piece(rows[part], matrix, widened, columns[part])
            losses[part], slope = piece.loss(log_p[part], weights[part], loss)
            accepted[part] = piece.accepted
            dense, corrections = piece.gradient(slope)
            if row_gradient is not None:
                corrected = corrections[:, None].to(rows.dtype) @ piece.chosen_rows
                row_gradient[part] = piece.summed[:, : rows.shape[1]] * dense + corrected[:, 0]
            if matrix_gradient is not None:
                trained = rows[part, num_fixed:]
                matrix_gradient[:, num_fixed:] += piece.exponentials.T @ (trained * dense)
                terms = corrections[:, :, None] * trained.float()[:, None]  # [n, k, r]
                matrix_gradient[:, num_fixed:].index_add_(0, columns[part].flatten(), terms.flatten(0, 1))
        ctx.gradients = (row_gradient, matrix_gradient, matrix.dtype)
        ctx.mark_non_differentiable(losses, accepted)
        return (weights * losses).sum(), losses, accepted

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
            None,
        )


class _Piece:
    """Some rows with all their logits, as exponentials.

    Attributes:
        exponentials: [n, V'], exp(logit - a shift of the row).
        summed: [n, r + 1 or more], exponentials @ (matrix and a column of ones).
        chosen_rows: [n, k, r], the matrix's rows of the k tokens.
        accepted: float32 [n], once the loss is known.
    """

    def __init__(self, rows: Tensor, matrix: Tensor, widened: Tensor, columns: Tensor) -> None:
        self.chosen_rows = matrix[columns]
        # Logits relative to that of the likeliest token, which makes sums of at least 1. Where another one is so far
        # above that the sum is no number, the highest is looked for; on a GPU always: to ask whether it must be costs
        # more than the product.
        looks_first = rows.device.type == "cuda"
        shift = (rows @ matrix.T).amax(-1) if looks_first else (rows * self.chosen_rows[:, 0]).sum(-1)
        self.exponentials, self.summed = self._exponentials(rows, widened, shift)
        if not looks_first and not bool(torch.isfinite(self.summed).all()):
            shift = (rows @ matrix.T).amax(-1)
            self.exponentials, self.summed = self._exponentials(rows, widened, shift)
        self.normaliser = self.summed[:, rows.shape[1], None].float()  # [n, 1]
        chosen = (self.chosen_rows.float() @ rows.float()[:, :, None])[:, :, 0] - shift.float()[:, None]
        # In bfloat16 the two are rounded apart: no probability is above 1.
        self._log_q = (chosen - self.normaliser.log()).clamp(max=0.0)  # [n, k]
        self._q_rest = (1.0 - self._log_q.exp().sum(1, keepdim=True)).clamp(min=_LEAST_REST)
        self.accepted = chosen[:, 0]

    def _exponentials(self, rows: Tensor, widened: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        exponentials = (_widened(rows, -shift) @ widened.T).exp_()
        return exponentials, exponentials @ widened

    def loss(self, log_p: Tensor, weights: Tensor, loss: str) -> tuple[Tensor, Tensor]:
        """Of each row [n], and G [n, k + 1] of their weighted sum."""
        with torch.enable_grad():
            parts = torch.cat((self._log_q, self._q_rest.log()), dim=1).requires_grad_()
            p = with_rest(log_p)
            losses = LOSSES[loss](p, parts)
            (slope,) = torch.autograd.grad(losses, parts, weights)
        self.accepted = acceptance(p, parts.detach())
        return losses.detach(), slope

    def gradient(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dlogits: a factor [n, 1] on the exponentials, and what is added at the k tokens, float32 [n, k]."""
        rest_slope = slope[:, -1:] / self._q_rest
        dense = (rest_slope - slope.sum(1, keepdim=True)) / self.normaliser
        return dense.to(self.summed.dtype), slope[:, :-1] - self._log_q.exp() * rest_slope


def _widened(matrix: Tensor, column: Tensor) -> Tensor:
    """[n, r] with one more column, and zeros up to a width that products like."""
    width = -(-(matrix.shape[1] + 1) // _WIDTH) * _WIDTH
    wide = matrix.new_zeros(len(matrix), width)
    wide[:, : matrix.shape[1]] = matrix
    wide[:, matrix.shape[1]] = column
    return wide
