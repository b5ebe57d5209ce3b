"""Medusa-1 (arXiv 2401.10774): heads on a target that stays as it is.

Head h (0-based) at position t reads the target's last row at t, after its final norm, and guesses token t + h + 2;
the token at t + 1 is the target's own. Tokens a b c d e f at positions 0..5, labels from c on:

    position 1 (b): head 0 guesses d, head 1 e, head 2 f
    position 2 (c): head 0 guesses e, head 1 f
    position 3 (d): head 0 guesses f
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from outrider.configs.training import MedusaConfig
from outrider.kernels.transfers import upload
from outrider.workers.draft_heads.lm_head import LmHead, LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.heads import HeadLoss, start_head
from outrider.workers.training.metrics import StepCounts
from outrider.workers.training.vocabulary_loss import SoftTargets
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.source import WeightSource


def heads_shape(target: ModelConfig, head: LmHeadShape, config: MedusaConfig) -> MedusaShape:
    """Sizes of the heads that a configuration asks for."""
    return MedusaShape(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        lm_head=head,
        shares_lm_head=config.shared_lm_head,
    )


def start_heads(heads: MedusaHeads, source: WeightSource, low_rank: Mapping[str, Tensor]) -> None:
    """Every LM head starts as `start_head` says: a fresh Medusa head says about what the target says."""
    for head in heads.lm_heads:
        assert isinstance(head, LmHead)
        start_head(head, source, low_rank)


def plan_heads(lengths: list[int], is_label: Tensor, num_heads: int) -> list[tuple[Tensor, Tensor]]:
    """By head: positions it reads and positions of the tokens it guesses, int64 [M] each, as indices into all texts
    back to back. See the picture in the module."""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0).repeat_interleave(sizes)
    index = torch.arange(len(ends))
    next_is_label = torch.cat((is_label[1:], is_label.new_zeros(1))) & (index + 1 < ends)
    heads = []
    for head in range(num_heads):
        label = index + head + 2
        guesses = next_is_label & (label < ends)
        guesses[guesses.clone()] = is_label[label[guesses]]
        read = guesses.nonzero().squeeze(1)
        heads.append((read, read + head + 2))
    return heads


class Medusa1Training(nn.Module):
    """Heads and their loss: the sum over heads h of head_decay**(h + 1) times cross-entropy.

    Attributes:
        heads: what is trained.
    """

    def __init__(self, heads: MedusaHeads, config: MedusaConfig, dtype: torch.dtype) -> None:
        """dtype: of products."""
        super().__init__()
        self.heads = heads
        self.config = config
        self.dtype = dtype
        losses = []
        for head in range(heads.shape.num_heads):
            lm_head = heads.lm_heads[0 if heads.shape.shares_lm_head else head]
            assert isinstance(lm_head, LmHead)
            losses.append(HeadLoss(lm_head, "kl"))
        self._losses = nn.ModuleList(losses)

    @property
    def num_guesses(self) -> int:
        """Heads."""
        return self.heads.shape.num_heads

    def set_progress(self, fraction: float) -> None:
        """Nothing here changes with the part of the steps that is done."""

    def count_labels(self, batch: FeatureBatch) -> Tensor:
        """float32 [K]: of a batch, how many labels each head's loss is the mean over."""
        plan = plan_heads(batch.lengths, batch.is_label, self.num_guesses)
        losses: Any = self._losses
        within = losses[0].has(batch.tokens)
        return torch.tensor([float(within[labels].sum()) for _, labels in plan])

    def forward(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        """As in `Eagle3Training.forward`."""
        with torch.autocast(batch.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.loss_of(batch.normed.to(self.dtype), batch, totals, measure)

    def loss_of(
        self, normed: Tensor, batch: FeatureBatch, totals: Tensor, measure: bool
    ) -> tuple[Tensor, StepCounts]:
        """The loss with these rows [N, hidden] as what the heads read."""
        device = normed.device
        counts = StepCounts(self.num_guesses, len(batch.tokens), device)
        loss = torch.zeros((), device=device)
        for head, (places, labels) in enumerate(plan_heads(batch.lengths, batch.is_label, self.num_guesses)):
            head_loss: Any = self._losses[head]
            tokens = batch.tokens[labels]
            has = head_loss.has(tokens).nonzero().squeeze(1)
            read, columns, learned = upload((places, head_loss.columns(tokens), has), device)
            certain = SoftTargets(columns[:, None], torch.zeros(len(columns), 1, device=device))
            weights = torch.ones(len(columns), device=device)
            value, guesses = head_loss(
                self.heads.blocks[head](normed.index_select(0, read)), certain, learned, weights, measure
            )
            counts.add(head, len(learned), guesses, read)
            loss = loss + self.config.head_decay ** (head + 1) * value / totals[head].clamp(min=1.0)
        return loss, counts
