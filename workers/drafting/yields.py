"""What a whole tree of proposals is worth, by order of value: learned from the trees that were proposed."""

from __future__ import annotations

import numpy as np

from outrider.workers.drafting.acceptance import follow_errors
from outrider.workers.sequences.tree import Bools, Floats, GrowingTrees, Ints


class TreeYields:
    """Of methods that propose a whole tree at once: how likely its first, second, … node is accepted, by law."""

    def __init__(self, first: Floats, num_laws: int) -> None:
        """first: [N], descending, assumed before any tree was seen."""
        self._first = first
        self._yields = np.tile(first, (num_laws, 1))

    def root_gains(self, laws: Ints) -> Floats:
        """What trees were worth so far, at least what is assumed at first."""
        return np.maximum(self._yields, self._first)[laws].ravel()

    def gains(self, trees: GrowingTrees, slots: Ints, laws: Ints) -> Floats:
        """[M], descending: what trees of roots would gain, less what these ([B], of these laws) hold already."""
        yields_so_far = self._yields.cumsum(axis=1)[laws]
        held = trees.values[slots, 1 : max(1, trees.width(slots))].sum(axis=1)
        left = np.maximum(yields_so_far - held[:, None], 0.0)
        left[:, 1:] -= left[:, :-1].copy()
        return np.sort(left[left > 0.0])[::-1]

    def learn_found(self, laws: Ints, owners: Ints, values: Floats) -> None:
        """Trees ([B], of these laws) were proposed: values [M] of their nodes in any order, by the tree of each."""
        order = np.lexsort((-values, owners))
        owners, values = owners[order], values[order]
        place = np.arange(len(owners)) - np.searchsorted(owners, owners)
        kept = place < len(self._first)
        by_tree = np.zeros((len(laws), len(self._first)))
        by_tree[owners[kept], place[kept]] = values[kept]
        self.learn(laws, by_tree, by_tree > 0.0)

    def learn(self, laws: Ints, values: Floats, met: Bools) -> None:
        """Trees were proposed: values [B, N] of their nodes, descending as proposed, 0 where nothing was (`met`)."""
        follow_errors(self._yields, laws, (values - self._yields[laws]) * met, met)
