"""How far a drafter's law q is from the target's p: losses per row, and what the fast path is compared with.

p is kept as its k likeliest tokens and the mass of all others, and q is looked at in the same k + 1 parts. The other
tokens being one part, each loss is that of the coarser laws: exact for the k tokens, a lower bound in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(log p, log q), float32 [N, k + 1] each, the last column being all other tokens -> [N], nats or a fraction."""

LK_DECAY = 3.0  # eta of arXiv 2602.23881
_LOG_ZERO = -80.0  # stands for log 0: exp of it is no number that a sum would notice


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of min(p, q): how often speculative sampling would accept, [N]."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats; with one certain token it is cross-entropy."""
    return (log_p.exp() * (log_p.clamp(min=_LOG_ZERO) - log_q)).sum(-1)


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation: half the sum of |p - q|, which is 1 - `acceptance`."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def lk_alpha(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log of the acceptance (LK losses, arXiv 2602.23881)."""
    return -acceptance(log_p, log_q).clamp(min=1e-6).log()


def lk_lambda(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL while acceptance is low, total variation once it is high (arXiv 2602.23881): w KL + (1 - w) TV with
    w = exp(-3 acceptance), here row by row."""
    weight = torch.exp(-LK_DECAY * acceptance(log_p, log_q).detach())
    return weight * kl(log_p, log_q) + (1 - weight) * tv(log_p, log_q)


def kl_tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """A tenth KL, which has a slope everywhere, and total variation (DSpark, arXiv 2607.05147)."""
    return 0.1 * kl(log_p, log_q) + 0.9 * tv(log_p, log_q)


LOSSES: Mapping[str, RowLoss] = {
    "kl": kl,
    "tv": tv,
    "kl_tv": kl_tv,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
}
"""By the name in the configuration."""


def with_rest(log_p: Tensor) -> Tensor:
    """Log-probabilities [N, k] of some tokens -> [N, k + 1], with that of all others."""
    rest = (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0.0)
    return torch.cat((log_p, rest.log().clamp(min=_LOG_ZERO)), dim=-1)


def eager_loss(logits: Tensor, columns: Tensor, log_p: Tensor, weights: Tensor, loss: RowLoss) -> Tensor:
    """The sum over rows of weight * loss, written out: what `vocabulary_loss` computes in pieces.

    Args:
        logits: [N, V'].
        columns, log_p: int64 and float [N, k], the target's likeliest tokens and their log-probabilities.
        weights: [N].
    """
    log_q = torch.log_softmax(logits, dim=-1)
    here = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, columns, True)
    rest = log_q.masked_fill(here, -torch.inf).logsumexp(-1, keepdim=True).clamp(min=_LOG_ZERO)
    parts = torch.cat((log_q.gather(1, columns), rest), dim=-1)
    return (weights * loss(with_rest(log_p), parts)).sum()
