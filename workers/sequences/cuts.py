"""What is cut out of growing trees, and what a verdict leaves of them: a row per sequence, padded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from outrider.workers.sequences.segments import pick

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class DraftTrees(NamedTuple):
    """What one round verifies, a row per sequence. Node 0 is the last known token and its own parent;
    `parents[b, i] < i`. Beyond `counts[b]` a row is padding.

    Attributes:
        counts: int64 [B] nodes, the root included.
        tokens, parents: int64 [B, K].
        growing_nodes: int64 [B, K] the same nodes in `GrowingTrees`.
    """

    counts: Ints
    tokens: Ints
    parents: Ints
    growing_nodes: Ints

    @staticmethod
    def roots(tokens: Ints) -> DraftTrees:
        """Plain decoding after these tokens ([B])."""
        column = tokens[:, None]
        zeros = np.zeros_like(column)
        return DraftTrees(np.ones(len(tokens), dtype=np.int64), column, zeros, zeros)

    @property
    def exists(self) -> Bools:
        """[B, K]: where there is a node."""
        return np.arange(self.tokens.shape[1]) < self.counts[:, None]

    def rows(self, which: Ints) -> DraftTrees:
        """The trees of some of the sequences ([b] indices)."""
        return DraftTrees(
            self.counts[which], self.tokens[which], self.parents[which], self.growing_nodes[which]
        )


class Window(NamedTuple):
    """The nodes of B trees as a rectangle as wide as the largest of them.

    Attributes:
        width: nodes of the largest.
        starts: int64 [B], where each tree begins in a flat array over the rectangle.
        places: int64 [B, width], of each node in `GrowingTrees.flat`.
    """

    width: int
    starts: Ints
    places: Ints


class FlatNodes(NamedTuple):
    """The arrays of `GrowingTrees` as [S * N], in which one index names slot and node: the cheapest to look up."""

    tokens: Ints
    parents: Ints
    depths: Ints
    sources: Ints
    acceptances: Floats
    values: Floats
    child_mass: Floats


class Offers(NamedTuple):
    """The nodes that a round may verify, a row per sequence, most valuable first; parents before children.

    Attributes:
        nodes: int64 [B, K] nodes of the growing trees.
        values: float64 [B, K] descending; 0 behind a row's end.
    """

    nodes: Ints
    values: Floats


class Survivors(NamedTuple):
    """What a verdict left of some trees: how methods move what they keep beside the nodes.

    Attributes:
        slots: int64 [B].
        old_nodes: int64 [B, M] the old node of each new one; beyond `counts[b]` padding.
        counts: int64 [B] new nodes, the root included.
        has_old_root: bool [B] the new root was a node of the old tree; otherwise the tree was started afresh.
        paths: bool [B, N] the old nodes that came out, the old root included.
    """

    slots: Ints
    old_nodes: Ints
    counts: Ints
    has_old_root: Bools
    paths: Bools

    @property
    def exists(self) -> Bools:
        """[B, M]: where there is a node."""
        return np.arange(self.old_nodes.shape[1]) < self.counts[:, None]

    def rows(self, which: Ints) -> Survivors:
        """Of some of the trees ([b] indices)."""
        return Survivors(
            self.slots[which],
            self.old_nodes[which],
            self.counts[which],
            self.has_old_root[which],
            self.paths[which],
        )


def path_products(factors: Floats, above: Ints, max_depth: int) -> Floats:
    """Of every node the product of the factors on its path, those of the node and of its root included.

    By doubling: each time a node's product takes in that of the node above its upper end.

    Args:
        factors: float64 [B, N], 1 at roots.
        above: int64 [B, N], each node's parent as an index into the flattened factors; a root is its own.
        max_depth: of the nodes, at most.
    """
    for _ in range(max_depth.bit_length()):
        factors = factors * factors.reshape(-1)[above]
        above = above.reshape(-1)[above]
    return factors


def best_path_first(window: Window, nodes: Ints, parents: Ints, exists: Bools) -> Ints:
    """Nodes of growing trees ([B, K], root first, by value) in a topological order that starts with the best path.

    parents: int64 [B, K], of these nodes, in the growing trees.
    """
    starts = window.starts[:, None]
    best_child = np.zeros(window.places.size, dtype=np.int64)  # of a growing node
    # Of several assignments to one place the last holds: from the least valuable to the best. In copies, because
    # numpy assigns views of negative stride in the order of memory. Padding assigns roots to roots, first of all.
    best_child[(starts + parents)[:, :0:-1].copy()] = nodes[:, :0:-1].copy()
    is_best = np.zeros(len(best_child), dtype=np.bool_)
    is_best[window.starts] = True
    current = best_child[window.starts]
    while np.count_nonzero(current):
        here = window.starts + current
        is_best[here] = True
        # Padding and leaves point at roots, from which no way leads on.
        current = best_child[here] * (current > 0)
    behind = np.where(exists, ~is_best[starts + nodes], 2)
    return pick(nodes, behind.argsort(axis=1, kind="stable"))
