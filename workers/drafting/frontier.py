"""Which nodes of growing trees a draft step expands: a node's row needs those of all its ancestors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from outrider.workers.sequences.tree import Bools, Floats, Ints


class Frontier(NamedTuple):
    """The nodes that the next step expands, those of a slot together, parents first.

    Attributes:
        slots: int64 [B], those of which any are.
        counts: int64 [B] nodes of each.
        num_unread: int64 [B] known tokens before the root that the step has to read.
        node_slots, nodes: int64 [M].
        places: int64 [M], of each node in the trees' `flat`.
        gains: float64 [M].
    """

    slots: Ints
    counts: Ints
    num_unread: Ints
    node_slots: Ints
    nodes: Ints
    places: Ints
    gains: Floats

    @property
    def num_rows(self) -> int:
        """Of the forward."""
        return len(self.nodes) + sum(self.num_unread.tolist())

    def of(self, which: Bools, which_nodes: Bools) -> Frontier:
        """That of some slots ([B]), whose nodes are `which_nodes` ([M])."""
        return Frontier(
            self.slots[which],
            self.counts[which],
            self.num_unread[which],
            self.node_slots[which_nodes],
            self.nodes[which_nodes],
            self.places[which_nodes],
            self.gains[which_nodes],
        )


def add_ancestors(parents: Ints, chosen: Bools, has_row: Bools) -> None:
    """Mark in `chosen` what has to be computed before what is marked; [B, N] each."""
    owners, nodes = chosen.nonzero()
    while len(nodes):
        nodes = parents[owners, nodes]
        missing = ~has_row[owners, nodes] & ~chosen[owners, nodes]
        owners, nodes = owners[missing], nodes[missing]
        chosen[owners, nodes] = True


def with_ancestors(parents: Ints, gains: Floats, has_row: Bools, most: int) -> Bools:
    """[N]: of one tree ([N] each) the nodes of best gain > 0 for which there is room with all that is above them."""
    chosen, num_chosen = np.zeros_like(has_row), 0
    for node in (-gains).argsort(kind="stable").tolist():
        if gains[node] <= 0.0 or num_chosen == most:
            break
        needed: list[int] = []
        above = node
        while not has_row[above] and not chosen[above] and len(needed) <= most:
            needed.append(above)
            if above == 0:
                break
            above = int(parents[above])
        if num_chosen + len(needed) <= most:
            chosen[needed] = True
            num_chosen += len(needed)
    return chosen
