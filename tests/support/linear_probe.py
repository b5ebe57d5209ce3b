"""A draft method that lives on the target's last hidden rows of known tokens: a linear map, learned on the way.

One forward without a cache, as Medusa's: from the newest committed row it proposes a token for each of the next
places. Its map is the sum of what was seen: of every committed row, times the token that came so far behind it. What
it keeps for shared prefixes is bounded, so that it may have forgotten rows which the target still has pages of.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Self

import numpy as np
import torch

from outrider.configs.schema import Config
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.method import DraftMethod, Forecast, MethodContext, Verified
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Floats, Ints, Survivors
from outrider.workers.weights.config import ModelConfig

_BLOCK = 8  # tokens; what is kept of prefixes is kept in such blocks
_NUM_BEST = 2  # proposals for the next token; one for each that follows the best
_NUM_LEVELS = 3
_PRIOR = 0.5


class LinearProbe(DraftMethod):
    """Keeps the row of every committed token, by position.

    Attributes:
        kept: of every sequence that left its slot, its tokens that had rows, and those rows [n, hidden].
        num_reused: rows that came from what was kept of a prefix.
    """

    name = "linear_probe"

    def __init__(
        self, slots: DraftedSlots, estimator: AcceptanceEstimator, target: ModelConfig, num_blocks: int = 512
    ) -> None:
        super().__init__(slots, estimator)
        self.needs = self._needs(target)
        self.kept: list[tuple[tuple[int, ...], torch.Tensor]] = []
        self.num_reused = 0
        (self._layer,) = self.needs.layers
        self._source = estimator.reserve(_NUM_LEVELS + 1)
        self._vocab_size, self._hidden_size = target.vocab_size, target.hidden_size
        self._rows = [torch.zeros(0, self._hidden_size)] * len(slots)
        self._maps = torch.zeros(len(slots), _NUM_LEVELS, self._vocab_size, self._hidden_size)
        self._num_learned = np.zeros((len(slots), _NUM_LEVELS), dtype=np.int64)  # rows
        self._has_proposed = np.ones(len(slots), dtype=np.bool_)
        self._num_blocks = num_blocks  # of prefixes, those used last
        self._blocks: OrderedDict[tuple[int, ...], torch.Tensor] = (
            OrderedDict()
        )  # by all tokens up to its end

    @classmethod
    def build(cls, context: MethodContext) -> Self:
        return cls(context.slots, context.estimator, context.target)

    @classmethod
    def needs_of(cls, config: Config, target: ModelConfig) -> HiddenNeeds:
        return cls._needs(target)

    @staticmethod
    def _needs(target: ModelConfig) -> HiddenNeeds:
        return HiddenNeeds((target.num_layers,), of_context=True)

    def prefix_kept(self, sequence: Sequence) -> int:
        tokens, end = tuple(sequence.tokens), 0
        while tokens[: end + _BLOCK] in self._blocks and end + _BLOCK <= len(tokens):
            end += _BLOCK
        return end

    def start(self, sequence: Sequence) -> None:
        slot, tokens = sequence.slot, tuple(sequence.tokens)
        ends = range(_BLOCK, sequence.num_committed + 1, _BLOCK)
        blocks = [self._blocks[tokens[:end]] for end in ends]
        self._rows[slot] = torch.cat([torch.zeros(0, self._hidden_size), *blocks])
        self.num_reused += len(self._rows[slot])
        self._maps[slot] = 0.0
        self._num_learned[slot] = 0
        self._has_proposed[slot] = True

    def finish(self, sequence: Sequence) -> None:
        rows = self._rows[sequence.slot]
        self.kept.append((tuple(sequence.tokens[: len(rows)]), rows))

    def observe(self, verified: Verified) -> None:
        assert verified.hidden is not None
        for step in verified.steps:
            slot, tokens = step.sequence.slot, tuple(step.sequence.tokens)
            assert len(self._rows[slot]) == step.num_known
            index = verified.hidden.rows_of(step.index, step.committed)
            new = verified.hidden.layers[self._layer][torch.from_numpy(index)]
            self._rows[slot] = torch.cat([self._rows[slot], new])
            self._keep_blocks(tokens, self._rows[slot])
            self._learn(slot, tokens)

    def rerooted(self, survivors: Survivors) -> None:
        self._has_proposed[survivors.slots] = False

    def forecast(self, slots: Ints) -> Forecast:
        ready = self._ready(slots)
        return Forecast(self._gains(len(ready)), len(ready), ready)

    def root_gains(self, laws: Ints) -> Floats:
        return self._gains(len(laws))

    def expand(self, slots: Ints) -> bool:
        ready = self._ready(slots)
        for slot in ready.tolist():
            scores = self._maps[slot] @ self._rows[slot][-1]  # [_NUM_LEVELS, vocab]
            best = scores[0].topk(_NUM_BEST).indices.numpy()
            self._propose(slot, np.zeros(_NUM_BEST, dtype=np.int64), best, 0)
            node, token = 0, best[0]
            for level in range(1, min(_NUM_LEVELS, int(self.slots.growth_depths(ready).min()))):
                children, found = self.trees.find_children(
                    np.array([slot]), np.array([node]), np.array([token])
                )
                if not found[0]:
                    break
                node, token = int(children[0]), int(scores[level].argmax())
                self._propose(slot, np.array([node]), np.array([token]), level)
            self._has_proposed[slot] = True
        return len(ready) > 0

    def _ready(self, slots: Ints) -> Ints:
        has_room = self.trees.room(slots) >= _NUM_BEST + _NUM_LEVELS
        return slots[~self._has_proposed[slots] & has_room & (self.slots.growth_depths(slots) > 0)]

    def _propose(self, slot: int, parents: Ints, tokens: Ints, level: int) -> None:
        sources = np.full(len(tokens), self._source + level)
        estimates = self.estimator.estimate(sources, np.full(len(tokens), _PRIOR))
        self.trees.add_children(np.full(len(tokens), slot), parents, tokens, estimates, sources)

    def _gains(self, count: int) -> Floats:
        (estimate,) = self.estimator.estimate(np.array([self._source]), np.array([_PRIOR]))
        return np.full(count, estimate)

    def _learn(self, slot: int, tokens: tuple[int, ...]) -> None:
        """The row at position p stands for what came at p + 2: the token at p + 1 is known by then."""
        for level in range(_NUM_LEVELS):
            first = int(self._num_learned[slot, level])
            targets = torch.tensor(tokens[first + 2 + level : len(self._rows[slot]) + 2 + level])
            if len(targets):
                rows = torch.nn.functional.normalize(self._rows[slot][first : first + len(targets)])
                self._maps[slot, level].index_add_(0, targets, rows)
                self._num_learned[slot, level] += len(targets)

    def _keep_blocks(self, tokens: tuple[int, ...], rows: torch.Tensor) -> None:
        for end in range(_BLOCK, len(rows) + 1, _BLOCK):
            self._blocks[tokens[:end]] = rows[end - _BLOCK : end]
            self._blocks.move_to_end(tokens[:end])
        while len(self._blocks) > self._num_blocks:
            self._blocks.popitem(last=False)
