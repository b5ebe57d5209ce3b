"""Verdicts over several trees at once, of different sizes and depths.

Tree 0:  10 ─┬─ 11 ─── 13 ── 15      nodes 0 = 10, 1 = 11, 2 = 13, 3 = 15, 4 = 12, 5 = 14
             └─ 12 ─── 14
Tree 1:  20
Tree 2:  30 ─── 31                   behind it padding that says 30, too
Tree 3:  40 ─┬─ 41
             └─ 42 ─── 43            nodes 1 = 41, 2 = 42, 3 = 43
"""

import random
from dataclasses import replace

import numpy as np
import pytest

from outrider.workers.sequences.rules import (
    EXACT,
    RULES,
    NodeScores,
    Origin,
    TypicalRule,
    Verdicts,
    follow,
    sampled_children,
)
from outrider.workers.sequences.sequence import EXACTLY, AcceptanceOptions
from outrider.workers.sequences.tree import DraftTrees, Floats, Ints
from support.steps import node_scores

TREES = DraftTrees(
    counts=np.array([6, 1, 2, 4]),
    tokens=np.array(
        [[10, 11, 13, 15, 12, 14], [20, 0, 0, 0, 0, 0], [30, 31, 30, 30, 30, 30], [40, 41, 42, 43, 0, 0]]
    ),
    parents=np.array([[0, 0, 1, 2, 0, 4], [0] * 6, [0] * 6, [0, 0, 0, 2, 0, 0]]),
    growing_nodes=np.zeros((4, 6), dtype=np.int64),
)
# What the target samples: all of tree 0's first branch; 21; 31 and then 30, as the padding; 42, then not 43.
SAMPLED = np.array(
    [[11, 13, 15, 16, 99, 99], [21, 0, 0, 0, 0, 0], [31, 30, 0, 0, 0, 0], [42, 99, 44, 99, 0, 0]]
)


def scores(tokens: Ints, *failed: tuple[int, int]) -> NodeScores:
    fails = np.zeros(tokens.shape, dtype=np.bool_)
    for place in failed:
        fails[place] = True
    return node_scores(tokens, fails)


def paths(verdicts: Verdicts) -> list[list[int]]:
    pairs = zip(verdicts.paths.tolist(), verdicts.num_accepted.tolist(), strict=True)
    return [path[: count + 1] for path, count in pairs]


def emitted(verdicts: Verdicts, trees: DraftTrees = TREES) -> list[list[tuple[int, str]]]:
    """Tokens that come out, each with its origin."""
    tokens, origins = verdicts.emitted(trees)
    return [
        [(token, Origin(origin).label) for token, origin in zip(*both, strict=True)][: count + 1]
        for *both, count in zip(
            tokens.tolist(), origins.tolist(), verdicts.num_accepted.tolist(), strict=True
        )
    ]


def test_exact_accepts_what_the_target_samples_in_every_tree() -> None:
    verdicts = EXACT.verdict(TREES, scores(SAMPLED))
    assert paths(verdicts) == [[0, 1, 2, 3], [0], [0, 1], [0, 2]]
    assert verdicts.num_accepted.tolist() == [3, 0, 1, 1]
    assert verdicts.next_tokens.tolist() == [16, 21, 30, 44]
    assert emitted(verdicts) == [
        [(11, "draft"), (13, "draft"), (15, "draft"), (16, "target")],
        [(21, "target")],
        [(31, "draft"), (30, "target")],
        [(42, "draft"), (44, "target")],
    ]
    assert not verdicts.is_kept.any()
    assert not verdicts.failed.any()
    assert RULES["exact"](EXACTLY) is EXACT
    assert EXACT.is_lossless


def test_a_path_that_ended_stays_ended_while_others_go_on() -> None:
    # Tree 2 ends after one step, tree 3 after none; a walk that began anew at their roots would count more.
    sampled = SAMPLED.copy()
    sampled[3, 0] = 99
    verdicts = EXACT.verdict(TREES, scores(sampled))
    assert paths(verdicts) == [[0, 1, 2, 3], [0], [0, 1], [0]]
    assert verdicts.next_tokens.tolist() == [16, 21, 30, 99]
    assert (verdicts.paths[3] == 0).all()


def test_children_hold_the_token_sampled_after_their_parents() -> None:
    found = sampled_children(TREES, scores(SAMPLED))
    assert [np.flatnonzero(row).tolist() for row in found] == [[1, 2, 3], [], [1], [2]]
    # After 12 14 is sampled: a child of a refused node is one, too. It changes no path.
    sampled = SAMPLED.copy()
    sampled[0, 4] = 14
    assert np.flatnonzero(sampled_children(TREES, scores(sampled))[0]).tolist() == [1, 2, 3, 5]
    assert paths(EXACT.verdict(TREES, scores(sampled)))[0] == [0, 1, 2, 3]


def test_nothing_is_accepted_below_a_node_that_failed() -> None:
    verdicts = EXACT.verdict(TREES, scores(SAMPLED, (0, 1), (1, 0), (3, 1), (3, 3)))
    assert paths(verdicts) == [[0, 1], [0], [0, 1], [0, 2]]
    # Only where the path ends is there no token; elsewhere nobody asks for one.
    assert verdicts.failed.tolist() == [True, True, False, False]
    # An invalid row's token is 0: a draft of token 0 is not its answer.
    zero = DraftTrees(np.array([2]), np.array([[5, 0]]), np.array([[0, 0]]), np.array([[0, 0]]))
    assert paths(EXACT.verdict(zero, scores(np.array([[0, 0]]), (0, 0)))) == [[0]]
    assert paths(EXACT.verdict(zero, scores(np.array([[0, 0]])))) == [[0, 1]]


def test_a_lossy_rule_says_which_tokens_it_kept() -> None:
    accepted = np.zeros(TREES.tokens.shape, dtype=np.bool_)
    accepted[0, [4, 5]] = accepted[2, 1] = accepted[3, [1, 2, 3]] = True  # of 41 and 42 the first counts
    verdicts = follow(TREES, scores(SAMPLED, (0, 5)), accepted)
    assert paths(verdicts) == [[0, 4, 5], [0], [0, 1], [0, 1]]
    assert emitted(verdicts) == [
        [(12, "kept"), (14, "kept"), (99, "target")],
        [(21, "target")],
        [(31, "draft"), (30, "target")],
        [(41, "kept"), (99, "target")],
    ]
    assert verdicts.is_kept.sum(axis=1).tolist() == [2, 0, 0, 1]
    assert verdicts.failed.tolist() == [True, False, False, False]


@pytest.mark.parametrize("seed", range(12))
def test_many_verdicts_at_once_are_what_each_is_alone(seed: int) -> None:
    rng = random.Random(seed)
    num_rows, width = rng.randint(1, 6), rng.randint(1, 12)
    tokens, parents = np.zeros((2, num_rows, width), dtype=np.int64)
    counts = np.array([rng.randint(1, width) for _ in range(num_rows)])
    for row, count in enumerate(counts):
        for node in range(1, width):
            parents[row, node] = rng.randrange(node) if node < count else 0
        for node in range(count):  # siblings differ
            siblings = np.flatnonzero(parents[row, :count] == node)
            tokens[row, siblings] = rng.sample(range(12), len(siblings))
    trees = DraftTrees(counts, tokens, parents, tokens)
    sampled = np.array([[rng.randrange(12) for _ in range(width)] for _ in range(num_rows)])
    for row, count in enumerate(counts):
        for node in range(1, count):
            if rng.random() < 0.7:
                sampled[row, parents[row, node]] = tokens[row, node]
    failed = [(row, node) for row in range(num_rows) for node in range(width) if rng.random() < 0.1]
    verdicts = EXACT.verdict(trees, scores(sampled, *failed))
    for row in range(num_rows):
        path = [0]
        while (row, path[-1]) not in failed:
            found = [
                node
                for node in range(1, counts[row])
                if parents[row, node] == path[-1] and tokens[row, node] == sampled[row, path[-1]]
            ]
            if not found:
                break
            path += found
        assert paths(verdicts)[row] == path
        expected = [*tokens[row, path[1:]].tolist(), sampled[row, path[-1]]]
        assert [token for token, _ in emitted(verdicts, trees)[row]] == expected
        assert verdicts.failed[row] == ((row, path[-1]) in failed)


def laws(**of_nodes: float) -> Floats:
    """[4, 6]: log p̃ of nodes of tree 0 (n1=0.2: probability 0.2 of node 1); nothing else is likely."""
    found = np.full(TREES.tokens.shape, -np.inf)
    for node, probability in of_nodes.items():
        found[0, int(node[1:])] = np.log(probability)
    return found


def typical(
    children: Floats, epsilon: float = 0.09, delta: float = 0.3, entropy: float = 0.0
) -> list[list[int]]:
    """Paths of tree 0 where the target samples what no node holds."""
    tokens, entropies = np.full(TREES.tokens.shape, 99), np.full(TREES.tokens.shape, entropy)
    verdicts = TypicalRule(epsilon, delta).verdict(
        TREES, node_scores(tokens, child_laws=children, entropies=entropies)
    )
    assert verdicts.is_kept[0, 1 : verdicts.num_accepted[0] + 1].all()
    assert paths(verdicts)[1:] == [[0], [0], [0]]
    return paths(verdicts)[0]


def test_typical_keeps_what_is_likely_for_how_sure_the_target_is() -> None:
    assert typical(laws(n1=0.1, n4=0.08)) == [0, 1]  # epsilon
    assert typical(laws(n4=0.04)) == [0]
    assert typical(laws(n4=0.04), entropy=2.1) == [0, 4]  # 0.3 * exp(-2.1) = 0.037
    assert typical(laws(n4=0.28), epsilon=1.0, delta=0.3) == [0]
    assert typical(laws(n4=0.32), epsilon=1.0, delta=0.3) == [0, 4]


def test_the_longest_path_wins_and_of_equals_the_likeliest() -> None:
    assert typical(laws(n1=0.8, n4=0.1, n5=0.1)) == [0, 4, 5]
    assert typical(laws(n1=0.3, n2=0.2, n4=0.3, n5=0.3)) == [0, 4, 5]
    assert typical(laws(n1=0.3, n2=0.5, n4=0.3, n5=0.3)) == [0, 1, 2]
    assert typical(laws(n2=0.9, n3=0.9, n4=0.1)) == [0, 4]  # 13 and 15 hang below a token that is out


def test_what_the_target_samples_is_accepted_by_every_rule_and_is_not_kept() -> None:
    # Node 1 is sampled, 2 is kept; nothing is below a law that is none. At the edge of a nucleus rounding may say
    # that a sampled token was removed.
    tokens = np.where(np.arange(6) == 0, 11, 99) * np.ones((4, 1), dtype=np.int64)
    failed = np.zeros(tokens.shape, dtype=np.bool_)
    failed[0, 2] = True
    verdicts = TypicalRule(0.09, 0.3).verdict(
        TREES, node_scores(tokens, failed, laws(n2=0.5, n3=0.5), np.zeros(tokens.shape))
    )
    assert paths(verdicts)[0] == [0, 1, 2]
    assert verdicts.is_kept[0].tolist()[:3] == [False, False, True]
    assert verdicts.failed[0]


def test_rules_that_ask_for_the_same_are_one() -> None:
    asked = AcceptanceOptions("typical", epsilon=0.2)
    assert RULES["typical"](asked) == RULES["typical"](replace(asked)) == TypicalRule(0.2, 0.3)
    assert RULES["typical"](asked) != RULES["typical"](EXACTLY)
