"""Levels of draft trees that grow on the device: what is handed over for the first step, and how what came of all of
them joins the trees, as if each had been a step of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.growth import GROWN
from outrider.kernels.proposals import NUM_KINDS_OF_LAW
from outrider.kernels.sample_shard import ROW
from outrider.kernels.shard_ids import ShardIds
from outrider.workers.drafting.row_cache import Expansion, RowCache
from outrider.workers.sampling.sampler import Prepared
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.tree import Floats, GrowingTrees, Ints


class Level(NamedTuple):
    """Nodes that a step expanded, [M] each, with what was proposed below them, [M, C], best first: ids, and log p,
    which is -inf where a law removed the token."""

    node_slots: Ints
    nodes: Ints
    places: Ints
    tokens: Ints
    log_probs: Floats


def can_grow(params: SamplingParams) -> bool:
    """Whether the law of a token depends on nothing but the model's logits and the token's position."""
    return not (params.follows_text or params.edits_logits)


def first_step(
    expansion: Expansion,
    trees: GrowingTrees,
    prepared: Prepared,
    laws: Sequence[SamplingParams],
    num_each: int,
    most_rows: Ints,
    max_depths: Ints,
    least_values: Floats,
    outcomes: Floats,
) -> tuple[Tensor, list[Tensor]]:
    """What `GrownSteps.take` is asked and given.

    Args:
        prepared: of the expansion's nodes, for as many proposals as there are.
        laws: [B], of the sequences.
        num_each: rows that each gets in a later step.
        most_rows: int64 [B], nodes that later steps may expand.
        max_depths: int64 [B]: nodes from there on are not expanded.
        least_values: [B]: nodes worth no more are not, either.
        outcomes: float32 [B, NUM_KINDS_OF_LAW, 2], see `AcceptanceEstimator.outcomes`.
    """
    rows, node_rows, num_rows = expansion.rows, expansion.node_rows, len(expansion.rows.tokens)
    own = prepared.foreseen.rows.copy()
    own["source"] = node_rows
    own["wants_raw"], own["raw_likeliest"] = 0, -1
    asked = np.full((num_rows, ROW.itemsize), 255, dtype=np.uint8)
    asked[node_rows] = own.view(np.uint8).reshape(len(own), -1)
    first_nodes = expansion.num_nodes.cumsum() - expansion.num_nodes
    grown = np.zeros(len(expansion.slots), dtype=GROWN)
    grown["row"] = own[first_nodes]
    grown["seed"] = [params.seed for params in laws]
    grown["is_greedy"] = [params.is_greedy for params in laws]
    grown["least_value"], grown["max_depth"], grown["most_rows"] = least_values, max_depths, most_rows
    grown["first_row"] = rows.query_lens.cumsum() - rows.query_lens
    grown["num_rows"], grown["num_known"] = rows.query_lens, expansion.num_catching_up
    grown["context_len"], grown["tree_len"] = rows.context_lens, rows.tree_lens
    grown["root_position"] = trees.root_positions[expansion.slots]
    values, depths = np.zeros(num_rows, dtype=np.float32), np.zeros(num_rows, dtype=np.int32)
    values[node_rows] = trees.flat.values[expansion.places]
    depths[node_rows] = trees.flat.depths[expansion.places]
    given = (
        np.array([len(grown), num_each], dtype=np.int32),
        grown.view(np.uint8).reshape(len(grown), -1),
        outcomes,
        values,
        depths,
    )
    assert outcomes.shape[1:] == (NUM_KINDS_OF_LAW, 2)
    return torch.from_numpy(asked), [torch.from_numpy(x) for x in given]


class JoinedLevels:
    """Puts one step after the other into the trees."""

    def __init__(
        self,
        trees: GrowingTrees,
        rows: RowCache,
        ids: ShardIds,
        expansion: Expansion,
        num_each: int,
        max_rows: int,
        num_best: int,
    ) -> None:
        """`max_rows`, `num_best`: of the shape by which places of proposals are counted."""
        self._trees, self._rows, self._ids, self._expansion = trees, rows, ids, expansion
        self._num_each, self._max_rows, self._num_best = num_each, max_rows, num_best
        self._node_of: dict[int, tuple[int, int]] = {}  # by row over all steps: slot and node
        self._tokens: list[Ints] = []  # [N, C] of each step
        self.outputs: list[tuple[int, int]] = []  # rows over all steps, and the places of their nodes

    def next(self, columns: np.ndarray, log_probs: np.ndarray, stands_for: np.ndarray) -> Level:
        """Of the next step, from what all its rows proposed: int32 and float32 [N, C], and int32 [N] what they stand
        for; the first is the expansion. Call it when what the steps before proposed has joined the trees: a tree may
        have been full."""
        own = self._expansion
        if not self._tokens:
            nodes_there = (own.node_rows, own.node_slots, own.nodes, own.places)
        else:
            nodes_there = self._found(stands_for)
        rows, node_slots, nodes, places = nodes_there
        step, log_p = len(self._tokens), log_probs[rows].astype(np.float64)
        self._tokens.append(self._ids.of(np.maximum(columns, 0).astype(np.int64)))
        over_steps = (rows + step * self._max_rows).tolist()
        of_nodes = zip(node_slots.tolist(), nodes.tolist(), strict=True)
        self._node_of.update(zip(over_steps, of_nodes, strict=True))
        self.outputs += zip(over_steps, places.tolist(), strict=True)
        return Level(node_slots, nodes, places, self._tokens[-1][rows], log_p)

    def _found(self, stands_for: np.ndarray) -> tuple[Ints, Ints, Ints, Ints]:
        """Rows that stand for nodes; the slots of these, they themselves, and their places."""
        slots = self._expansion.slots
        rows = np.arange(len(slots) * self._num_each)
        rows = rows[stands_for[rows] >= 0]
        parents, ranks = np.divmod(stands_for[rows].astype(np.int64), self._num_best)
        known = [index for index, parent in enumerate(parents.tolist()) if parent in self._node_of]
        rows, parents, ranks = rows[known], parents[known], ranks[known]
        above = np.array([self._node_of[parent] for parent in parents.tolist()], dtype=np.int64).reshape(
            -1, 2
        )
        at_step, at_row = np.divmod(parents, self._max_rows)
        tokens = np.array(
            [self._tokens[s][r, c] for s, r, c in zip(at_step, at_row, ranks, strict=True)], dtype=np.int64
        )
        node_slots = above[:, 0]
        nodes, found = rows, rows >= 0
        if len(rows):
            nodes, found = self._trees.find_children(node_slots, above[:, 1], tokens)
        places = node_slots * self._trees.capacity + nodes
        found &= ~self._rows.flat_has_row[places]
        rows, node_slots, nodes, places = rows[found], node_slots[found], nodes[found], places[found]
        self._rows.grown(slots, self._num_each, nodes, places, node_slots, rows % self._num_each)
        return rows, node_slots, nodes, places
