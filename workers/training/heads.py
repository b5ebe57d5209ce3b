"""LM heads in training: which ids they have, what they start as, their loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from outrider.configs.training import TrainedHeadConfig
from outrider.workers.draft_heads.lm_head import (
    DenseLmHead,
    LmHead,
    LmHeadShape,
    LowRankLmHead,
    low_rank_start,
    rank_of,
)
from outrider.workers.training.metrics import NUM_RANKS, Guesses
from outrider.workers.training.vocabulary_loss import SoftTargets, vocabulary_loss
from outrider.workers.weights.resolver import resolve_vocabulary
from outrider.workers.weights.source import WeightSource, head_name

_ALL = slice(None)


def read_ids(config: TrainedHeadConfig, vocab_size: int) -> Tensor:
    """int64 [V'], ascending: the target's token of each logit. Raises ValueError for a bad `head.ids`."""
    if not config.ids:
        return torch.arange(vocab_size)
    path = resolve_vocabulary(config.ids, "head.ids")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"head.ids must be a JSON file with a list of token ids: {error}") from error
    if not isinstance(found, list) or not all(type(item) is int and 0 <= item < vocab_size for item in found):
        raise ValueError(f"head.ids: {path} must hold a list of token ids from 0 to {vocab_size - 1}")
    if len(set(found)) < 2:
        raise ValueError(f"head.ids: {path} must hold at least 2 token ids, got {len(set(found))}")
    return torch.tensor(sorted(set(found)), dtype=torch.int64)


def head_shape(config: TrainedHeadConfig, hidden_size: int, ids: Tensor) -> LmHeadShape:
    """Sizes of the head that a configuration asks for."""
    low_rank = config.kind == "low_rank"
    rank = rank_of(hidden_size, config.rank_divisor) if low_rank else hidden_size
    return LmHeadShape(hidden_size, len(ids), rank)


@torch.no_grad()
def start_head(head: LmHead, source: WeightSource, low_rank: Mapping[str, Tensor]) -> None:
    """Makes a head the target's rows of its ids, or the two matrices `low_rank`, by name, that come near them."""
    if isinstance(head, LowRankLmHead):
        head.load_state_dict(dict(low_rank))
    else:
        assert isinstance(head, DenseLmHead)
        head.weight.copy_(head_weight(source, head.ids))


def low_rank_head(source: WeightSource, ids: Tensor, rank: int, rows: Tensor) -> dict[str, Tensor]:
    """Weights of a low-rank head, for `start_head`; rows: [N, hidden], of the target after its final norm."""
    down, up = low_rank_start(head_weight(source, ids), rank, rows)
    return {"down.weight": down, "up.weight": up}


def head_weight(source: WeightSource, ids: Tensor) -> Tensor:
    """The target's head, float32 [V', hidden], of these ids."""
    return source.read(head_name(source), _ALL, _ALL, torch.float32)[ids]


def label_weights(decay: float, totals: Tensor, sizes: Sequence[int]) -> Tensor:
    """float32 [sum of sizes]: of each of sizes[k] labels of step (or level) k, decay**k / totals[k], with which a sum
    over all becomes the decayed sum of means.

    Args:
        totals: float32 [at least len(sizes)], labels of each step over all ranks and forwards.
    """
    steps = torch.arange(len(sizes), device=totals.device)
    by_step = decay**steps / totals[: len(sizes)].clamp(min=1.0)
    return by_step.repeat_interleave(torch.tensor(sizes).to(totals.device), output_size=sum(sizes))


class HeadLoss(nn.Module):
    """The loss of one LM head over some rows, and what its guesses are worth.

    Holds the head without owning it: its parameters are the drafter's.
    """

    def __init__(self, head: LmHead, loss: str) -> None:
        super().__init__()
        self._head = [head]
        self._loss = loss
        self._ids = [head.ids.cpu().clone()]  # in a list: stays on the host wherever the module goes

    @property
    def head(self) -> LmHead:
        return self._head[0]

    def has(self, tokens: Tensor) -> Tensor:
        """bool, of the shape of int64 `tokens` on the host: which of them are tokens of the head."""
        ids = self._ids[0]
        return ids[self.columns(tokens)] == tokens

    def columns(self, tokens: Tensor) -> Tensor:
        """Logits of int64 `tokens` on the host; any where the head has none."""
        return torch.searchsorted(self._ids[0], tokens).clamp(max=len(self._ids[0]) - 1)

    def forward(
        self,
        normed: Tensor,
        soft: SoftTargets,
        learned: Tensor,
        weights: Tensor,
        measure: bool,
        pair_rows: Tensor | None = None,
        successors: Tensor | None = None,
    ) -> tuple[Tensor, Guesses]:
        """The weighted sum of the losses of those of M labels that are learned.

        Args:
            normed: [M, hidden], as the head reads them.
            soft: the target's law of each label, over the head's ids.
            learned: int64 [L], which labels: those that the head `has`.
            weights: float32 [M].
            measure: look at ranks, too.
            pair_rows, successors: [M, rank] and [V', rank], whose products are added to the head's logits.
        """
        soft = soft.at(learned)
        rows, matrix = normed.index_select(0, learned), self._matrix()
        if isinstance(self.head, LowRankLmHead):
            rows = self.head.down(rows)
        elif torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        num_fixed = 0
        if pair_rows is not None and successors is not None and pair_rows.shape[1]:
            num_fixed = 0 if matrix.requires_grad else matrix.shape[1]
            rows = torch.cat((rows, pair_rows.index_select(0, learned).to(rows.dtype)), dim=1)
            matrix = torch.cat((matrix, successors), dim=1)
        value, losses, accepted = vocabulary_loss(rows, matrix, soft, weights[learned], self._loss, num_fixed)
        found = torch.zeros(2, len(normed), device=rows.device)
        found[:, learned] = torch.stack((losses, accepted))
        ranks = None
        if measure:
            ranks = torch.full((len(normed),), NUM_RANKS, device=rows.device)
            ranks[learned] = self._ranks(rows.detach(), matrix.detach(), soft.columns[:, 0])
        return value, Guesses(found[0], found[1], ranks)

    def _matrix(self) -> Tensor:
        if isinstance(self.head, LowRankLmHead):
            return self.head.up.weight
        return self.head.matrix()

    @torch.no_grad()
    def _ranks(self, rows: Tensor, matrix: Tensor, columns: Tensor) -> Tensor:
        """Place of `columns` int64 [M] among the guesses: how many tokens have a higher logit, up to NUM_RANKS."""
        ranks = []
        # In float32: of logits in bfloat16 many are equal.
        rows, matrix = rows.float(), matrix.float()
        for start in range(0, len(rows), 256):
            logits = rows[start : start + 256] @ matrix.T
            own = logits.gather(1, columns[start : start + 256, None])
            ranks.append((logits > own).sum(1).clamp(max=NUM_RANKS))
        return torch.cat(ranks) if ranks else columns
