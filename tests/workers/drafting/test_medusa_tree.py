"""Trees of independent guesses: the paper's greedy construction, on arrays."""

from collections import Counter

import numpy as np
import pytest

from outrider.workers.drafting.medusa_tree import GuessTrees, best_trees

# Logarithms of accuracies for which the greedy construction gives the tree that FasterDecoding ships for the 7B
# (mc_sim_7b_63), in its order; the accuracies themselves were not published.
LOG_ACCURACIES = np.array(
    [
        [-0.4, -3.77, -5.25, -6.29, -7.29, -7.95, -8.19, -8.43, -8.71, -9.0],
        [-2.33, -4.61, -5.75, -6.56, -6.94, -7.41, -7.7, -7.84, -8.08, -8.27],
        [-3.28, -5.13, -5.8, -6.84, -7.27, -7.32, -7.46, -7.65, -7.7, -7.74],
        [-4.09, -5.42, -9.0, -9.0, -9.0, -9.0, -9.0, -9.0, -9.0, -9.0],
    ]
)
NODES_BY_DEPTH = {1: 10, 2: 28, 3: 23, 4: 2}
NODES_BY_DEPTH_AND_RANK = {
    (1, 0): 1,
    (1, 1): 1,
    (1, 2): 1,
    (1, 3): 1,
    (1, 4): 1,
    (1, 5): 1,
    (1, 6): 1,
    (1, 7): 1,
    (1, 8): 1,
    (1, 9): 1,
    (2, 0): 10,
    (2, 1): 4,
    (2, 2): 3,
    (2, 3): 2,
    (2, 4): 2,
    (2, 5): 2,
    (2, 6): 2,
    (2, 7): 1,
    (2, 8): 1,
    (2, 9): 1,
    (3, 0): 10,
    (3, 1): 4,
    (3, 2): 2,
    (3, 3): 1,
    (3, 4): 1,
    (3, 5): 1,
    (3, 6): 1,
    (3, 7): 1,
    (3, 8): 1,
    (3, 9): 1,
    (4, 0): 1,
    (4, 1): 1,
}


def paths_of(trees: GuessTrees, b: int) -> list[tuple[int, ...]]:
    """Ranks from head 0 on, of all nodes but the root, in order."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, trees.ranks.shape[1]):
        parent = int(trees.parents[b, node])
        assert parent < node
        assert trees.depths[b, node] == trees.depths[b, parent] + 1
        paths.append((*paths[parent], int(trees.ranks[b, node])))
    return paths[1:]


def greedy(accuracies: np.ndarray, num_nodes: int) -> list[tuple[int, ...]]:
    """Node by node, as the paper says: the most valuable neighbour of the tree comes next."""
    num_heads, num_ranks = accuracies.shape
    found: list[tuple[int, ...]] = []
    open_paths = {(0,)}
    while len(found) < num_nodes:
        best = max(open_paths, key=lambda path: np.prod([accuracies[k, i] for k, i in enumerate(path)]))
        open_paths.remove(best)
        found.append(best)
        if best[-1] + 1 < num_ranks:
            open_paths.add((*best[:-1], best[-1] + 1))
        if len(best) < num_heads:
            open_paths.add((*best, 0))
    return found


def test_the_published_tree_has_63_nodes_and_these_shapes() -> None:
    trees = best_trees(np.exp(LOG_ACCURACIES)[None], 63)
    paths = paths_of(trees, 0)
    assert len(set(paths)) == 63
    assert trees.depths.shape == (1, 64)
    assert Counter(map(len, paths)) == NODES_BY_DEPTH
    assert Counter((len(path), path[-1]) for path in paths) == NODES_BY_DEPTH_AND_RANK
    assert paths == greedy(np.exp(LOG_ACCURACIES), 63)


@pytest.mark.parametrize("num_nodes", [1, 9, 63])
def test_trees_are_those_of_the_greedy_construction(num_nodes: int) -> None:
    falling = np.sort(np.random.default_rng(0).random((5, 4, 10)) ** 3, axis=2)[:, :, ::-1]
    trees = best_trees(falling, num_nodes)
    assert (np.diff(trees.values) <= 0.0).all()
    for b, accuracies in enumerate(falling):
        paths = paths_of(trees, b)
        assert paths == greedy(accuracies, num_nodes)
        known = {(), *paths}
        for path, value in zip(paths, trees.values[b, 1:], strict=True):
            assert path[:-1] in known
            assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in known
            np.testing.assert_allclose(value, np.prod([accuracies[k, i] for k, i in enumerate(path)]))


def test_a_tree_has_no_more_nodes_than_there_are_guesses_and_marks_those_that_cannot_be() -> None:
    accuracies = np.array([[[0.5, 0.25], [0.5, 0.0]], [[0.0, 0.0], [0.5, 0.5]]])
    trees = best_trees(accuracies, 63)
    assert trees.values.tolist() == [[1.0, 0.5, 0.25, 0.25, 0.125, 0.0, 0.0], [1.0, *[0.0] * 6]]
    assert paths_of(trees, 0)[:4] == [(0,), (1,), (0, 0), (1, 0)]
