"""Medusa heads (arXiv 2401.10774; FasterDecoding/Medusa): head k guesses the token k places after the target's next.

All read one row, the target's last hidden one *after* its final norm. Head k (k = 1..K) at position t is for the
token at t + k + 1; the token at t + 1 is the target's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head


@dataclass(frozen=True)
class MedusaShape:
    """Sizes of a set of Medusa heads.

    Attributes:
        hidden_size, vocab_size: the target's.
        num_heads: K.
        num_layers: residual blocks of each head.
        lm_head: of each head, or of the one that all share.
        shares_lm_head: all heads end in one LM head (vLLM's `original_lm_head`).
    """

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_layers: int
    lm_head: LmHeadShape
    shares_lm_head: bool


class ResBlock(nn.Module):
    """x + SiLU(W x + b); W and b start at zero, so that a fresh head says what the target's own says."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.Module):
    """K heads over the same rows.

    Attributes:
        blocks: K lists of `num_layers` residual blocks.
        lm_heads: K LM heads, or one that all share.
    """

    def __init__(self, shape: MedusaShape, ids: Tensor) -> None:
        """`ids`: int64 [shape.lm_head.num_ids], the target's token of each logit, ascending."""
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(shape.hidden_size) for _ in range(shape.num_layers)))
            for _ in range(shape.num_heads)
        )
        num_lm_heads = 1 if shape.shares_lm_head else shape.num_heads
        self.lm_heads = nn.ModuleList(make_lm_head(shape.lm_head, ids) for _ in range(num_lm_heads))

    @property
    def ids(self) -> Tensor:
        """int64 [V'], the target's token of each logit."""
        ids = self.lm_heads[0].ids
        assert isinstance(ids, Tensor)
        return ids

    def forward(self, normed: Tensor) -> Tensor:
        """[N, hidden], after the target's final norm -> logits [K, N, V']."""
        return torch.stack([self.logits(head, normed) for head in range(self.shape.num_heads)])

    def logits(self, head: int, normed: Tensor) -> Tensor:
        """Of one head (0..K-1, for the token head + 2 places ahead): [N, hidden] -> [N, V']."""
        lm_head = self.lm_heads[0 if self.shape.shares_lm_head else head]
        logits: Tensor = lm_head(self.blocks[head](normed))
        return logits
