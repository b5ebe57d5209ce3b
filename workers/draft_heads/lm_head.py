"""LM heads of drafters: logits of all of the target's tokens, or of some of them, by one matrix or by two small ones.

A head and the ids of its rows belong together: a table of ids beside another head's rows drafts at chance. Trimmed:
VocabTrim (arXiv 2506.22694). Low rank: SlimSpec (arXiv 2605.10453), with the names of its only public trainer
(TorchSpec): `lm_head.down.weight` [rank, hidden], `lm_head.up.weight` [V', hidden].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadKind = Literal["full", "trimmed", "low_rank"]


@dataclass(frozen=True)
class LmHeadShape:
    """Sizes of a drafter's LM head.

    Attributes:
        hidden_size: columns of its input.
        num_ids: tokens that it has logits of, V'.
        rank: of a head made of two matrices; the hidden size means one matrix of full rank.
    """

    hidden_size: int
    num_ids: int
    rank: int

    @property
    def is_low_rank(self) -> bool:
        return self.rank < self.hidden_size


class LmHead(nn.Module):
    """Normed hidden rows [..., hidden] -> logits [..., V'] of the target's token ids `ids`.

    Attributes:
        ids: int64 [V'], ascending: the target's token of each logit.
    """

    ids: Tensor

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        assert ids.dtype == torch.int64
        assert bool((ids.diff() > 0).all()), "ids must ascend"
        # Written by the formats in their own ways (d2t, token_map), not as a weight.
        self.register_buffer("ids", ids, persistent=False)

    @property
    def shape(self) -> LmHeadShape:
        """Its sizes."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The one matrix [V', hidden] that gives the same logits."""
        raise NotImplementedError


class DenseLmHead(LmHead):
    """One matrix."""

    def __init__(self, hidden_size: int, ids: Tensor) -> None:
        super().__init__(ids)
        self.weight = nn.Parameter(torch.empty(len(ids), hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    @property
    def shape(self) -> LmHeadShape:
        num_ids, hidden_size = self.weight.shape
        return LmHeadShape(hidden_size, num_ids, hidden_size)

    def matrix(self) -> Tensor:
        return self.weight

    def forward(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.weight)


class LowRankLmHead(LmHead):
    """Two matrices, nothing between them: up(down(h)), hidden -> rank -> V'."""

    def __init__(self, hidden_size: int, rank: int, ids: Tensor) -> None:
        super().__init__(ids)
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, len(ids), bias=False)

    @property
    def shape(self) -> LmHeadShape:
        return LmHeadShape(self.down.in_features, self.up.out_features, self.down.out_features)

    def matrix(self) -> Tensor:
        return self.up.weight @ self.down.weight

    def forward(self, normed: Tensor) -> Tensor:
        logits: Tensor = self.up(self.down(normed))
        return logits


def make_lm_head(shape: LmHeadShape, ids: Tensor) -> LmHead:
    """A head with random weights; `ids` int64 [shape.num_ids]."""
    assert len(ids) == shape.num_ids
    if shape.is_low_rank:
        return LowRankLmHead(shape.hidden_size, shape.rank, ids)
    return DenseLmHead(shape.hidden_size, ids)


def low_rank_start(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best two matrices for one of full rank, by truncated SVD: down [rank, hidden], up [V', rank].

    The singular values are shared evenly between the two, so that both have gradients of one size.

    Args:
        weight: [V', hidden], V' >= hidden.
    """
    matrix = weight.double()
    # Of the small Gram matrix instead of the tall one: the right vectors are the same, and V' may be 150,000.
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)  # ascending
    right = vectors[:, -rank:].flip(1)  # [hidden, rank]
    scale = values[-rank:].flip(0).clamp(min=1e-30).pow(0.25)  # square roots of singular values
    up = (matrix @ right) / scale
    return (right * scale).T.float().contiguous(), up.float().contiguous()


def rank_of(hidden_size: int, divisor: int) -> int:
    """`lm_head_rank_divisor` of a configuration, 2 to hidden_size, as a rank: hidden // divisor (TorchSpec)."""
    assert 2 <= divisor <= hidden_size
    return hidden_size // divisor
