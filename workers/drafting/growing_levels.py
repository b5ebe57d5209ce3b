"""Levels that follow each other on a GPU without the host, where a request's law is the model's alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as SequenceABC

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.proposals import NUM_KINDS_OF_LAW, NUM_SAMPLED_KINDS
from outrider.kernels.selection import KernelSelection
from outrider.workers.drafting.frontier import Frontier
from outrider.workers.drafting.grown_levels import JoinedLevels, can_grow, first_step
from outrider.workers.drafting.levels import MIN_GAIN, LevelMethod
from outrider.workers.drafting.method import NO_FURTHER_STEPS, Following
from outrider.workers.drafting.row_cache import Expansion
from outrider.workers.model.batch import lay_out
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.grown_steps import MAX_GROWN_STEPS, GrownSteps, LevelForward
from outrider.workers.model.static_batch import GraphCapacity
from outrider.workers.sampling.sampler import Prepared
from outrider.workers.sequences.tree import Bools, Ints


class GrowingLevelMethod(LevelMethod):
    """Who derives from this calls `grow_by` once its graphs are captured."""

    _grown: GrownSteps | None = None

    def grow_by(
        self,
        forward: LevelForward,
        kernels: KernelSelection,
        cache: PagedCache,
        capacities: SequenceABC[GraphCapacity],
        pool: object = None,
    ) -> None:
        """From now on levels follow each other without the host, if these graphs can be captured; else a warning says
        why not.

        Args:
            kernels: those that the drafter uses.
            capacities, pool: as in `GrownSteps`.
        """
        if not (kernels.sample_shard and kernels.grow_trees):
            return
        num_best, num_tokens = self._limits.max_children, self._num_target_tokens
        try:
            self._grown = GrownSteps(
                forward, capacities, cache, self._sampler.ids, num_best, num_tokens, pool
            )
        except Exception as error:  # of torch, the CUDA driver or NVRTC, which have no class in common
            warnings.warn(f"the drafter's steps run one by one: {error}", stacklevel=2)

    @property
    def grows_alone(self) -> bool:
        """Whether levels can follow each other without the host."""
        return self._grown is not None

    def _growing_inputs(self, expansion: Expansion) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the rows of a first step read of the features, int64, and which of these move before: from, to."""
        none = torch.zeros(0, dtype=torch.int64)
        return torch.zeros(len(expansion.rows.tokens), dtype=torch.int64), (none, none)

    def _has_grown(self, features: Ints, places: Ints) -> None:
        """Nodes at these places have left these features, which stay until the next first step."""

    def _following(self, frontier: Frontier) -> Following:
        if self._grown is None or not np.count_nonzero(self._can_follow(frontier.slots)):
            return NO_FURTHER_STEPS
        frontier = self._of_followed(frontier)
        below = self.slots.growth_depths(frontier.node_slots) - self.trees.flat.depths[frontier.places]
        return Following(
            most=min(MAX_GROWN_STEPS, int(below.max())) - 1,
            decay=float(self._yields[self.slots.laws[frontier.slots], 0].max()),
            rows_per_sequence=self._rows_per_sequence(len(frontier.slots)),
            num_proposals=self._limits.max_children,
        )

    def _of_followed(self, frontier: Frontier) -> Frontier:
        can_follow = self._can_follow(frontier.slots)
        if self._grown is None or not 0 < np.count_nonzero(can_follow) < len(can_follow):
            return frontier
        return frontier.of(can_follow, can_follow.repeat(frontier.counts))

    def _can_follow(self, slots: Ints) -> Bools:
        """[B]: whose laws a level without the host can be ranked by."""
        return np.array([can_grow(self._laws[slot][0]) for slot in slots.tolist()], dtype=np.bool_)

    def _grow_levels(self, expansion: Expansion, prepared: Prepared, num_further: int) -> int:
        slots, grown = expansion.slots, self._grown
        if grown is None or not self._can_follow(slots).all():
            return 0
        num_each = self._rows_per_sequence(len(slots))
        num_free = self._rows.num_free_rows(slots) - expansion.num_nodes
        num_further = min(num_further, MAX_GROWN_STEPS - 1, int(num_free.min()) // num_each)
        sizes = zip(slots.tolist(), expansion.num_nodes.tolist(), strict=True)
        if not all(self._rows.take_rows(slot, num + num_further * num_each) for slot, num in sizes):
            num_further = 0
        batch = lay_out(self._rows.tables, expansion.rows)
        place = grown.place_for(batch, num_each, 1 + num_further)
        if place is None:
            num_further, place = 0, grown.place_for(batch, num_each, 1)
        if place is None:
            return 0
        laws = [self._laws[slot][0] for slot in slots.tolist()]
        promised = np.add.reduce(self._yields, axis=1)[self.slots.laws[slots]]
        outcomes = self.estimator.outcomes(
            self._first_source, NUM_SAMPLED_KINDS, self.slots.rules[slots]
        ).reshape(len(slots), 2, NUM_KINDS_OF_LAW, 2)
        asked, given = first_step(
            expansion,
            self.trees,
            prepared,
            laws,
            num_each,
            most_rows=np.maximum(
                self.trees.room(slots) // self._limits.max_children - expansion.num_nodes, 0
            ),
            max_depths=self.slots.growth_depths(slots),
            least_values=MIN_GAIN / np.maximum(promised, 1e-9),
            outcomes=outcomes[np.arange(len(slots)), self.slots.is_greedy[slots].astype(np.int64)],
        )
        reads, moves = self._growing_inputs(expansion)
        self._stretches.begin()
        grown.take(place, batch, reads, torch.from_numpy(expansion.node_rows), moves, asked, given)
        history = grown.run(1 + num_further)
        self._stretches.end("forward", len(expansion.rows.tokens) + num_further * num_each * len(slots))
        self._stretches.settle()
        self._rows.computed(expansion)
        self._planned = None  # also where the trees have all the proposals already
        shape = grown.shape(place)
        joined = JoinedLevels(
            self.trees, self._rows, self._sampler.ids, expansion, num_each, shape.max_rows, shape.num_best
        )
        for columns, log_probs, stands_for in history:
            level = joined.next(columns, log_probs, stands_for)
            if len(level.nodes):
                self._propose(level, level.tokens, level.log_probs)
        outputs = np.array(joined.outputs, dtype=np.int64)
        self._has_grown(grown.features_of(outputs[:, 0]), outputs[:, 1])
        return 1 + num_further
