"""A draft method that reads the target's hidden rows of tree nodes, at two depths of the target.

One step per level, as EAGLE's, but what stands for its model is memory: below every open leaf it proposes what came
so far behind the earlier node whose rows are most like those of the last node that came out.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch

from outrider.configs.schema import Config
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.method import DraftMethod, Forecast, MethodContext, Verified
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import DraftTrees, Floats, Ints, Survivors
from outrider.workers.weights.config import ModelConfig

_PRIOR = 0.4


class TwoTaps(DraftMethod):
    """Keeps the rows of every node that was verified, until the verdict; those of nodes that came out for good.

    Attributes:
        seen: of every verified node the row that entered each tap, [2, hidden], by all tokens up to the node's own.
        num_survivors: nodes below which it went on after a verdict.
    """

    name = "two_taps"
    needs = HiddenNeeds((1, 2))

    def __init__(self, slots: DraftedSlots, estimator: AcceptanceEstimator, target: ModelConfig) -> None:
        super().__init__(slots, estimator)
        assert target.num_layers >= max(self.needs.layers)
        self.seen: dict[tuple[int, ...], torch.Tensor] = {}
        self.num_survivors = 0
        self._source = estimator.reserve(1)
        shape = self.trees.tokens.shape
        self._has_row = np.zeros(shape, dtype=np.bool_)  # by node
        self._rows = torch.zeros(*shape, 2 * target.hidden_size)
        self._is_expanded = np.zeros(shape, dtype=np.bool_)
        self._positions: list[list[int]] = [[] for _ in range(len(slots))]  # of nodes that came out
        self._memory: list[list[torch.Tensor]] = [[] for _ in range(len(slots))]

    @classmethod
    def build(cls, context: MethodContext) -> Self:
        return cls(context.slots, context.estimator, context.target)

    @classmethod
    def needs_of(cls, config: Config, target: ModelConfig) -> HiddenNeeds:
        return cls.needs

    def start(self, sequence: Sequence) -> None:
        self._has_row[sequence.slot] = self._is_expanded[sequence.slot] = False
        self._positions[sequence.slot], self._memory[sequence.slot] = [], []

    def observe(self, verified: Verified) -> None:
        hidden = verified.hidden  # None where all are in the middle of their prompts
        for step in verified.steps:
            slot, nodes = step.sequence.slot, step.growing_nodes
            if hidden is None or not len(nodes):
                continue
            index = hidden.rows_of(step.index, step.chain_length - 1 + np.arange(len(nodes)))
            rows = torch.stack([hidden.layers[layer][torch.from_numpy(index)] for layer in self.needs.layers])
            self._rows[slot, nodes] = rows.transpose(0, 1).flatten(1)
            self._has_row[slot, nodes] = True
            known = tuple(step.sequence.tokens[: step.num_known + step.chain_length])
            for k, node in enumerate(nodes.tolist()):
                self.seen[known + self._path(slot, node)] = rows[:, k]

    def rerooted(self, survivors: Survivors) -> None:
        for b, slot in enumerate(survivors.slots.tolist()):
            path = np.flatnonzero(survivors.paths[b])  # parents are older than their children
            assert self._has_row[slot, path].all()
            end = int(self.trees.root_positions[slot])
            self._positions[slot] += range(end - len(path), end)
            self._memory[slot] += torch.nn.functional.normalize(self._rows[slot, path])
            old = survivors.old_nodes[b, : survivors.counts[b]]
            kept = self._is_expanded[slot, old] if survivors.has_old_root[b] else np.zeros(len(old), bool)
            self._is_expanded[slot], self._has_row[slot] = False, False
            self._is_expanded[slot, : len(old)] = kept
            self.num_survivors += int((~kept).sum()) - 1

    def forecast(self, slots: Ints) -> Forecast:
        owners, nodes = self._open(slots)
        values = self.trees.values[slots[owners], nodes]
        counted = self.trees.depths[slots[owners], nodes] < self.slots.max_depth[slots[owners]]
        return Forecast(
            np.sort(values[counted])[::-1] * self._estimate(), len(nodes), np.unique(slots[owners])
        )

    def root_gains(self, laws: Ints) -> Floats:
        return np.full(len(laws), self._estimate())

    def survival(self, slots: Ints, sent: DraftTrees) -> float:
        owners, nodes = self._open(slots)
        is_sent = np.zeros(self._has_row.shape, dtype=np.bool_)
        exists = sent.exists
        is_sent[np.nonzero(exists)[0], sent.growing_nodes[exists]] = True
        return float(self.trees.values[slots[owners], nodes][~is_sent[owners, nodes]].max(initial=0.0))

    def expand(self, slots: Ints) -> bool:
        owners, nodes = self._open(slots)
        for slot, node in zip(slots[owners].tolist(), nodes.tolist(), strict=True):
            self._is_expanded[slot, node] = True
            token = self._continuation(slot, int(self.trees.depths[slot, node]))
            self.trees.add_children(
                np.array([slot]),
                np.array([node]),
                np.array([token]),
                np.array([self._estimate()]),
                np.array([self._source]),
            )
        return len(nodes) > 0

    def _open(self, slots: Ints) -> tuple[Ints, Ints]:
        """Leaves to go on below, where there is something to go by: owners among `slots`, and nodes."""
        is_open = self.slots.open_nodes(slots, self.slots.growth_depths(slots))
        width = is_open.shape[1]
        is_open &= ~self._is_expanded[slots, :width] & (self.trees.child_mass[slots, :width] == 0.0)
        is_open &= (self.trees.room(slots) >= 1)[:, None]
        is_open &= np.array([len(self._memory[slot]) > 1 for slot in slots.tolist()], dtype=bool)[:, None]
        return np.nonzero(is_open)

    def _continuation(self, slot: int, depth: int) -> int:
        """The token behind a node at this depth: the newest memory is of the node before the root."""
        memory, tokens = torch.stack(self._memory[slot]), self.slots.sequence(slot).tokens
        nearest = int((memory[:-1] @ memory[-1]).argmax())
        return tokens[min(self._positions[slot][nearest] + 2 + depth, len(tokens) - 1)]

    def _path(self, slot: int, node: int) -> tuple[int, ...]:
        tokens: list[int] = []
        while node:
            tokens.append(int(self.trees.tokens[slot, node]))
            node = int(self.trees.parents[slot, node])
        return tuple(tokens[::-1])

    def _estimate(self) -> float:
        return float(self.estimator.estimate(np.array([self._source]), np.array([_PRIOR]))[0])
