"""A low-rank LM head fitted to a law (SlimSpec, arXiv 2605.10453) by forward KL: AdamW 4e-4, cosine, clip 0.5.

The paper trains head and drafter together on the target's law, so the target's law is what a head that is fitted
afterwards learns, too. What it starts as the paper does not say: see `low_rank_start`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.workers.draft_heads.lm_head import LmHead, LowRankLmHead, low_rank_start

_MEASURED_ROWS = 4096  # of held-out text: some 0.01 in a fraction
_START_ROWS = 12_000  # enough to see the directions of hidden rows


@dataclass(frozen=True)
class HeadRows:
    """What an LM head reads on given texts, and what the target's reads where it guesses the same tokens.

    Attributes:
        rows: [N, hidden], as the head reads them, of any float type.
        laws: int64 [N], of each the index into `law_rows`.
        law_rows: [M, hidden of the target], as the target's head reads them.
    """

    rows: Tensor
    laws: Tensor
    law_rows: Tensor

    def logits(self, head: LmHead, index: Tensor) -> Tensor:
        """float32 [B, V'] of the drafter with this head, for some rows, int64 [B]."""
        logits: Tensor = head(self.rows[index].float())
        return logits

    @torch.no_grad()
    def law(self, index: Tensor, teacher: Tensor) -> Tensor:
        """float32 logits [B, V'] of the law that the head is to have there; teacher: float32 [V', hidden of the
        target], the rows of its head."""
        return self.law_rows[self.laws[index]].float() @ teacher.T


@dataclass(frozen=True)
class PairedRows(HeadRows):
    """Of a head with a pair term beside it, see `pairs`.

    Attributes:
        pair_rows: [N, rank], of the token before each guess.
        successors: float32 [V', rank], which they are multiplied with.
    """

    pair_rows: Tensor
    successors: Tensor

    def logits(self, head: LmHead, index: Tensor) -> Tensor:
        return super().logits(head, index) + self.pair_rows[index].float() @ self.successors.T


@dataclass(frozen=True)
class SlimSettings:
    """How a head is fitted.

    Attributes:
        rank: of the head.
        passes: how often all rows are read.
        batch_rows: rows of an optimizer step.
        learning_rate, max_gradient_norm: of AdamW; the rate falls to 0 by a cosine.
        seed: of the order of rows.
    """

    rank: int
    passes: int
    batch_rows: int
    learning_rate: float = 4e-4
    max_gradient_norm: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class HeadQuality:
    """A head against a law, over some rows.

    Attributes:
        kl: KL(law || head), nats.
        agreement: fraction of rows where both have the same likeliest token.
        acceptance: mean over rows of the sum of min(p, q).
    """

    kl: float
    agreement: float
    acceptance: float


@torch.no_grad()
def slim_start(head: LmHead, rank: int, rows: Tensor) -> LowRankLmHead:
    """The head of this rank that comes nearest to another with its ids; rows: [N, hidden], as heads read them."""
    start = LowRankLmHead(head.shape.hidden_size, rank, head.ids)
    down, up = low_rank_start(head.matrix(), rank, rows[:: math.ceil(len(rows) / _START_ROWS)])
    start.down.weight.copy_(down)
    start.up.weight.copy_(up)
    return start


def fit(
    head: LowRankLmHead,
    rows: HeadRows,
    teacher: Tensor,
    settings: SlimSettings,
    progress: Callable[[int, int, float], None],
) -> int:
    """Trains a head in place; returns the optimizer's steps.

    Args:
        teacher: see `HeadRows.law`.
        progress: called with steps done, steps in all and the loss in nats.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    per_pass = math.ceil(len(rows.rows) / settings.batch_rows)
    total = settings.passes * per_pass
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    done = 0
    for _ in range(settings.passes):
        for index in torch.randperm(len(rows.rows), generator=generator).split(settings.batch_rows):
            log_p = rows.law(index, teacher).log_softmax(-1)
            log_q = rows.logits(head, index).log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), settings.max_gradient_norm)
            optimizer.step()
            schedule.step()
            done += 1
            progress(done, total, float(loss.detach()))
    return done


@torch.no_grad()
def quality(head: LmHead, rows: HeadRows, teacher: Tensor, batch_rows: int) -> HeadQuality:
    """How close a head is to the law, over evenly spread rows, some thousands at most.

    teacher: see `HeadRows.law`.
    """
    num_rows = len(rows.rows)
    chosen = torch.arange(0, num_rows, max(1, num_rows // _MEASURED_ROWS))
    sums = torch.zeros(3, dtype=torch.float64)
    for index in chosen.split(batch_rows):
        log_p = rows.law(index, teacher).log_softmax(-1)
        log_q = rows.logits(head, index).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        kl = (p * (log_p - log_q)).sum()
        same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        sums += torch.stack((kl, same, torch.minimum(p, q).sum())).double()
    kl_mean, agreement, acceptance = (sums / len(chosen)).tolist()
    return HeadQuality(kl_mean, agreement, acceptance)
