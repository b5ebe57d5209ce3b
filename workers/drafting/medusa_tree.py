"""Trees of independent guesses: which combinations of heads' candidates are worth verifying.

Of heads that all read the same row, the chance that a path is right is the product of its guesses' accuracies. The
greedy construction of Medusa (arXiv 2401.10774, section 2.3.3) adds the most valuable neighbour of the tree, node by
node; where accuracies do not rise with the rank these are the most valuable nodes of all, and so they are found here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outrider.workers.sequences.segments import pick
from outrider.workers.sequences.tree import Floats, Ints


@dataclass(frozen=True)
class GuessTrees:
    """Trees in order of value: a parent stands before its children, a better sibling before a worse one.

    Attributes:
        depths: int64 [B, N + 1]; node 0 is the root, at depth 0, and its own parent. A node at depth d is a guess of
            head d - 1.
        ranks: int64 [B, N + 1], of the guess among its head's; 0 of the root.
        parents: int64 [B, N + 1].
        values: float64 [B, N + 1], products along the paths, descending; 0 of nodes that can never come true.
    """

    depths: Ints
    ranks: Ints
    parents: Ints
    values: Floats


def best_trees(accuracies: Floats, num_nodes: int) -> GuessTrees:
    """The `num_nodes` most valuable nodes of each tree, besides its root.

    Args:
        accuracies: float64 [B, K, R] by head and rank, not rising with the rank; B trees.
        num_nodes: as many as there are, at most: R + R² + … + R^K.
    """
    num_trees, num_heads, num_ranks = accuracies.shape
    values, depths, ranks, parents = [np.ones((num_trees, 1))], [0], [_zeros(num_trees)], [_zeros(num_trees)]
    first = 0  # of the level above, its place among all
    for head in range(num_heads):
        # A node of the best ones has its ancestors among the best ones, on each level.
        below = values[-1][:, :, None] * accuracies[:, head, None, :]
        below = below.reshape(num_trees, -1)
        order = (-below).argsort(axis=1, kind="stable")[:, :num_nodes]
        values.append(pick(below, order))
        ranks.append(order % num_ranks)
        parents.append(first + order // num_ranks)
        first += depths.count(head)
        depths += [head + 1] * order.shape[1]
    all_values = np.concatenate(values, axis=1)
    # Levels stand one behind the other, so of equal values the node that is less deep comes first.
    order = (-all_values[:, 1:]).argsort(axis=1, kind="stable")[:, :num_nodes] + 1
    order = np.concatenate([_zeros(num_trees), order], axis=1)
    places = np.zeros(all_values.shape, dtype=np.int64)
    places[np.arange(num_trees)[:, None], order] = np.arange(order.shape[1])
    return GuessTrees(
        depths=np.array(depths)[order],
        ranks=pick(np.concatenate(ranks, axis=1), order),
        parents=pick(places, pick(np.concatenate(parents, axis=1), order)),
        values=pick(all_values, order),
    )


def _zeros(num_trees: int) -> Ints:
    return np.zeros((num_trees, 1), dtype=np.int64)
