"""LM heads of drafters: logits of all of the target's tokens, or of some of them, by one matrix or by two small ones.

A head and the ids of its rows belong together: a table of ids beside another head's rows drafts at chance. Trimmed:
VocabTrim (arXiv 2506.22694). Low rank: SlimSpec (arXiv 2605.10453), with the names of its only public trainer
(TorchSpec): `lm_head.down.weight` [rank, hidden], `lm_head.up.weight` [V', hidden].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.workers.draft_heads.start_values import fill_normal

_LAW_ROWS = 256
_LEAST_IMPORTANCE = 0.1


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

    def is_target_sized(self, vocab_size: int) -> bool:
        """One matrix with a row for each of the target's tokens, as the target's own."""
        return not self.is_low_rank and self.num_ids == vocab_size


class LmHead(nn.Module, ABC):
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
    @abstractmethod
    def shape(self) -> LmHeadShape:
        """Its sizes."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The one matrix [V', hidden] that gives the same logits."""


class DenseLmHead(LmHead):
    """One matrix."""

    def __init__(self, hidden_size: int, ids: Tensor) -> None:
        super().__init__(ids)
        self.weight = nn.Parameter(torch.empty(len(ids), hidden_size))
        fill_normal(self.weight, hidden_size**-0.5)

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


def low_rank_start(weight: Tensor, rank: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The two matrices that come nearest to the one's logits at the rows it will read, by a weighted SVD.

    The plain SVD of a language model's head is nearly useless: it keeps what distinguishes rare tokens, in directions
    that hidden rows hardly have. Measured on SmolLM2-135M at rank 72, on texts other than the rows': the target's
    own choice is the likeliest token in 1 % of positions, and in 53 % with this one. It minimises the squared error
    of logits over the rows, each token weighted by its mean probability there, after taking from all tokens' logits
    their mean, which no softmax sees. As ASVD and SVD-LLM (arXiv 2312.05821, 2403.07378), with weights on outputs.

    Args:
        weight: [V', hidden].
        rows: [N, hidden], what such a head reads, after the norm: some thousands.

    Returns:
        down [rank, hidden], up [V', rank], float32.
    """
    rows, weight = rows.float(), weight.float()
    law = torch.zeros(len(weight), device=weight.device)
    for piece in rows.split(_LAW_ROWS):
        law += (piece @ weight.T).softmax(-1).sum(0)
    law /= len(rows)
    importance = (law + _LEAST_IMPORTANCE * law.mean()).sqrt().double()[:, None]
    values, vectors = torch.linalg.eigh(rows.double().T @ rows.double() / len(rows))
    values = (
        values.clamp(min=0) + 1e-6 * values.mean()
    )  # directions that no row has are kept, as the least ones
    root = (vectors * values.sqrt()) @ vectors.T
    centred = weight.double() - law.double() @ weight.double()
    matrix = importance * (centred @ root)
    _, directions = torch.linalg.eigh(matrix.T @ matrix)  # ascending
    right = directions[:, -rank:].flip(1)  # [hidden, rank]
    up = (matrix @ right) / importance
    down = right.T @ ((vectors / values.sqrt()) @ vectors.T)
    balance = (up.norm(dim=0) / down.norm(dim=1)).clamp(min=1e-30).sqrt()
    return (down * balance[:, None]).float().contiguous(), (up / balance).float().contiguous()


def rank_of(hidden_size: int, divisor: int) -> int:
    """`lm_head_rank_divisor` of a configuration, 2 to hidden_size, as a rank: hidden // divisor (TorchSpec)."""
    assert 2 <= divisor <= hidden_size
    return hidden_size // divisor
