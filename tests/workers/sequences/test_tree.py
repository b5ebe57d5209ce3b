"""Trees written out by hand, and many at random beside the plain ones. The running example, value below each token:

10 ─┬─ 11 ─┬─ 13 ── 15          node 0 = 10, 1 = 11, 2 = 12, 3 = 13, 4 = 14, 5 = 15
    │ 0.8  │ 0.4    0.36
    │      └─ 14
    │        0.16
    └─ 12
      0.2

It stands in two slots; between them is a chain of ten nodes, 20, 21, …, which makes the arrays wider than it.
"""

import random

import numpy as np
import pytest

from outrider.workers.sequences.tree import DraftTrees, GrowingTrees, Ints
from support.plain_tree import PlainTree

Proposal = tuple[int, int, int, float, int]  # slot, parent, token, acceptance, source
LEVELS = ([(0, 11, 0.8, 1), (0, 12, 0.2, 2)], [(1, 13, 0.5, 3), (1, 14, 0.2, 4)], [(3, 15, 0.9, 5)])
EXAMPLES, CHAIN = (1, 3), 2
SLOTS = np.array([3, 2, 1])
CAPACITY = 12


def ints(*values: int) -> Ints:
    return np.array(values, dtype=np.int64)


def propose(trees: GrowingTrees, *proposals: Proposal) -> list[float]:
    slots, parents, tokens, acceptances, sources = zip(*proposals, strict=True)
    return trees.add_children(
        ints(*slots), ints(*parents), ints(*tokens), np.array(acceptances), ints(*sources)
    ).tolist()


def chain(trees: GrowingTrees, slot: int, below: int, tokens: list[int], acceptance: float) -> None:
    length = len(tokens)
    filled = (np.full((1, length), acceptance), np.full((1, length), 9))
    trees.add_chains(ints(slot), ints(below), np.array([tokens]), ints(length), *filled)


def example() -> GrowingTrees:
    trees = GrowingTrees(5, CAPACITY)
    for slot in (0, *EXAMPLES):
        trees.start(slot, 10, 7)
    for level in LEVELS:
        propose(trees, *[(slot, *proposal) for slot in EXAMPLES for proposal in level])
    trees.start(CHAIN, 20, 3)
    chain(trees, CHAIN, 0, list(range(21, 30)), 0.5)
    return trees


def column(array: np.ndarray, trees: GrowingTrees, slot: int) -> list:
    return array[slot, : trees.num_nodes[slot]].tolist()


def test_value_is_the_product_along_the_path() -> None:
    trees = example()
    for slot in EXAMPLES:
        assert column(trees.tokens, trees, slot) == [10, 11, 12, 13, 14, 15]
        assert column(trees.parents, trees, slot) == [0, 0, 0, 1, 1, 3]
        assert column(trees.depths, trees, slot) == [0, 1, 1, 2, 2, 3]
        assert column(trees.values, trees, slot) == pytest.approx([1.0, 0.8, 0.2, 0.4, 0.16, 0.36])
        assert column(trees.child_mass, trees, slot) == pytest.approx([1.0, 0.7, 0.0, 0.9, 0.0, 0.0])
        assert column(trees.sources, trees, slot) == [0, 1, 2, 3, 4, 5]
    assert column(trees.parents, trees, CHAIN) == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert column(trees.values, trees, CHAIN) == [0.5**depth for depth in range(10)]
    assert trees.room(ints(0, 3, 2)).tolist() == [11, 6, 2]


def test_a_token_proposed_twice_is_one_node_with_the_better_estimate() -> None:
    trees = example()
    # Less sure: nothing changes. Surer: the estimate and what it stands for.
    assert propose(trees, (3, 0, 11, 0.5, 8), (3, 0, 12, 0.6, 9)) == pytest.approx([0.8, 0.6])
    assert trees.num_nodes[3] == 6
    assert column(trees.acceptances, trees, 3)[:3] == [1.0, 0.8, 0.6]
    assert column(trees.sources, trees, 3)[:3] == [0, 1, 9]
    assert trees.child_mass[3, 0] == pytest.approx(1.4)


def test_a_better_estimate_raises_everything_below_and_nothing_elsewhere() -> None:
    trees = example()
    assert propose(trees, (1, 3, 16, 0.5, 6), (3, 1, 13, 1.0, 6)) == pytest.approx([0.2, 0.8])
    assert column(trees.values, trees, 3) == pytest.approx([1.0, 0.8, 0.2, 0.8, 0.16, 0.72])
    assert column(trees.values, trees, 1) == pytest.approx([1.0, 0.8, 0.2, 0.4, 0.16, 0.36, 0.2])


def test_a_chain_merges_with_what_is_there() -> None:
    trees = example()
    chain(trees, 3, 0, [11, 13, 16, 17], 0.6)
    assert column(trees.tokens, trees, 3)[6:] == [16, 17]
    assert column(trees.parents, trees, 3)[6:] == [3, 6]
    assert column(trees.depths, trees, 3)[6:] == [3, 4]
    assert column(trees.acceptances, trees, 3) == [1.0, 0.8, 0.2, 0.6, 0.2, 0.9, 0.6, 0.6]
    assert column(trees.values, trees, 3)[6:] == pytest.approx([0.288, 0.1728])
    assert trees.num_nodes.tolist() == [1, 6, 10, 8, 0]


def test_chains_that_arrive_at_one_node_share_their_links() -> None:
    # What follows the root leads through 11, 13, 15; what follows 15 says the same.
    trees = example()
    tokens = np.array([[11, 13, 15, 16, 17], [16, 17, 18, -1, -1], [11, 13, 15, 19, -1]])
    acceptances, sources = np.full((3, 5), 0.5), np.arange(15).reshape(3, 5)
    trees.add_chains(ints(3, 3, 1), ints(0, 5, 0), tokens, ints(5, 3, 4), acceptances, sources)
    assert column(trees.tokens, trees, 3)[6:] == [16, 17, 18]
    assert column(trees.parents, trees, 3)[6:] == [5, 6, 7]
    assert column(trees.child_mass, trees, 3)[5:] == [0.5, 0.5, 0.5, 0.0]
    assert column(trees.tokens, trees, 1)[6:] == [19]


def test_a_full_tree_takes_nothing_more_but_better_estimates() -> None:
    trees = example()
    given = propose(
        trees,
        (2, 0, 31, 0.4, 1),
        (2, 1, 32, 0.4, 1),
        (2, 0, 33, 0.4, 1),
        (2, 0, 21, 0.8, 1),
        (1, 0, 16, 0.1, 1),
    )
    assert given == pytest.approx([0.4, 0.32, 0.0, 0.8, 0.1])
    assert trees.room(ints(CHAIN)).tolist() == [0]
    chain(trees, CHAIN, 0, [31, 34], 0.7)  # its first link is there
    assert column(trees.tokens, trees, CHAIN)[10:] == [31, 32]
    assert trees.values[CHAIN, 10] == 0.7
    assert trees.child_mass[CHAIN, 10] == 0.0  # 34 is not there
    chain(trees, 3, 5, list(range(40, 50)), 0.5)
    assert column(trees.tokens, trees, 3)[6:] == [40, 41, 42, 43, 44, 45]
    # The next verdict makes room.
    trees.reroot(ints(CHAIN), ints(0), ints(21), ints(1))
    assert trees.room(ints(CHAIN)).tolist() == [CAPACITY - 10]


@pytest.mark.parametrize(
    ("max_nodes", "max_depth", "best"),
    [
        (9, 9, [1, 3, 5, 2, 4]),
        (3, 9, [1, 3, 5]),
        (9, 2, [1, 3, 2, 4]),
        (9, 1, [1, 2]),
        (0, 9, []),
        (9, 0, []),
        (9, -1, []),  # no token is wanted any more
    ],
)
def test_offers_are_the_most_valuable_nodes_within_the_limits(
    max_nodes: int, max_depth: int, best: list[int]
) -> None:
    trees = example()
    offers = trees.offers(SLOTS, ints(max_depth, 3, 9), ints(max_nodes, 2, 4))
    found = [nodes[values > 0.0].tolist() for nodes, values in zip(offers.nodes, offers.values, strict=True)]
    assert found == [best, [1, 2], [1, 3, 5, 2]]
    assert (np.diff(offers.values, axis=1) <= 0.0).all()


def test_equal_values_keep_parents_before_children() -> None:
    trees = GrowingTrees(1, 8)
    trees.start(0, 1, 0)
    chain(trees, 0, 0, [2, 3, 4, 5], 1.0)
    assert trees.offers(ints(0), ints(9), ints(9)).nodes[0].tolist()[:4] == [1, 2, 3, 4]


def cut(trees: GrowingTrees, slots: Ints, counts: list[int]) -> DraftTrees:
    return trees.cut(
        slots, trees.offers(slots, np.full(len(slots), 9), np.full(len(slots), 9)), ints(*counts)
    )


def test_a_cut_puts_the_likeliest_path_right_behind_the_root() -> None:
    trees = example()
    propose(trees, (3, 2, 16, 0.9, 1))  # 12 is worth 0.2, 16 below it 0.18, 14 0.16
    found = cut(trees, SLOTS, [6, 1, 4])
    assert found.counts.tolist() == [7, 2, 5]
    assert found.tokens[0].tolist() == [10, 11, 13, 15, 12, 16, 14]
    assert found.parents[0].tolist() == [0, 0, 1, 2, 0, 4, 1]
    assert found.growing_nodes[0].tolist() == [0, 1, 3, 5, 2, 6, 4]
    assert found.tokens[1, :2].tolist() == [20, 21]
    assert found.tokens[2, :5].tolist() == [10, 11, 13, 15, 12]
    assert found.parents[2, :5].tolist() == [0, 0, 1, 2, 0]
    assert found.exists.sum(axis=1).tolist() == [7, 2, 5]


def test_a_less_valuable_branch_comes_behind_the_path_even_where_it_is_worth_more_than_its_end() -> None:
    trees = GrowingTrees(1, 8)
    trees.start(0, 10, 0)
    propose(trees, (0, 0, 11, 0.5, 1), (0, 0, 12, 0.4, 1))
    propose(trees, (0, 1, 13, 0.2, 1))
    found = cut(trees, ints(0), [3])
    assert found.growing_nodes.tolist() == [[0, 1, 3, 2]]
    assert found.parents.tolist() == [[0, 0, 1, 0]]


def test_a_cut_of_nothing_is_plain_decoding() -> None:
    found, roots = cut(example(), SLOTS, [0, 0, 0]), DraftTrees.roots(ints(10, 20, 10))
    for name in ("counts", "tokens", "parents", "growing_nodes"):
        assert getattr(found, name).tolist() == getattr(roots, name).tolist()
    assert roots.rows(ints(1)).tokens.tolist() == [[20]]


def test_tails_are_the_last_tokens_of_text_and_path() -> None:
    trees = example()
    recent = np.array([[7, 8, 9, 10]] * 3 + [[18, 19, 20, 20]] * 2)
    tails = trees.tails(ints(3, 3, 1, CHAIN, CHAIN), ints(0, 4, 5, 2, 9), recent)
    assert tails.tolist() == [
        [7, 8, 9, 10],
        [9, 10, 11, 14],
        [10, 11, 13, 15],
        [20, 20, 21, 22],
        [26, 27, 28, 29],
    ]


def test_rerooting_keeps_what_hangs_below_the_tokens_that_came_out() -> None:
    trees = example()
    # In slot 3 11 came out; in 2 the text left the chain after two tokens; in 1 it followed 11, 13.
    left = trees.reroot(SLOTS, ints(0, 2, 1), ints(11, 99, 13), ints(1, 3, 2))
    assert left.slots.tolist() == [3, 2, 1]
    assert left.counts.tolist() == [4, 1, 2]
    assert left.has_old_root.tolist() == [True, False, True]
    assert left.old_nodes[0].tolist() == [1, 3, 4, 5]
    assert left.old_nodes[2, :2].tolist() == [3, 5]
    assert left.exists.sum(axis=1).tolist() == [4, 1, 2]
    assert [np.flatnonzero(path).tolist() for path in left.paths] == [[0], [0, 1, 2], [0, 1]]
    assert left.rows(ints(2)).old_nodes[:, :2].tolist() == [[3, 5]]
    assert column(trees.tokens, trees, 3) == [11, 13, 14, 15]
    assert column(trees.parents, trees, 3) == [0, 0, 0, 1]
    assert column(trees.depths, trees, 3) == [0, 1, 1, 2]
    assert column(trees.values, trees, 3) == pytest.approx([1.0, 0.5, 0.2, 0.45])
    assert column(trees.acceptances, trees, 3) == [1.0, 0.5, 0.2, 0.9]
    assert column(trees.child_mass, trees, 3) == pytest.approx([0.7, 0.9, 0.0, 0.0])
    assert column(trees.tokens, trees, 1) == [13, 15]
    assert [column(array, trees, 2) for array in (trees.tokens, trees.values)] == [[99], [1.0]]
    assert column(trees.child_mass, trees, 2) == [0.0]
    assert trees.root_positions.tolist() == [7, 9, 6, 8, 0]


def test_a_rerooted_tree_grows_on() -> None:
    trees = example()
    trees.reroot(ints(2, 3), ints(0, 0), ints(99, 11), ints(1, 1))
    assert propose(trees, (3, 3, 17, 0.5, 1), (2, 0, 21, 0.5, 1)) == pytest.approx([0.225, 0.5])
    assert cut(trees, ints(3), [4]).tokens.tolist() == [[11, 13, 15, 17, 14]]
    trees.reroot(ints(3), ints(0), ints(14), ints(1))  # a leaf
    assert column(trees.tokens, trees, 3) == [14]
    trees.start(3, 5, 0)
    assert column(trees.tokens, trees, 3) == [5]


def test_below_nodes_that_are_worth_nothing_a_tree_starts_afresh() -> None:
    trees = GrowingTrees(1, 200)
    trees.start(0, 0, 0)
    chain(trees, 0, 0, list(range(1, 150)), 0.001)
    assert trees.values[0, 149] == 0.0  # 1e-447
    left = trees.reroot(ints(0), ints(120), ints(121), ints(121))
    assert left.has_old_root.tolist() == [False]
    assert column(trees.values, trees, 0) == [1.0]
    assert np.isfinite(trees.values).all()


def assert_equal(trees: GrowingTrees, plain: list[PlainTree]) -> None:
    for slot, tree in enumerate(plain):
        nodes = tree.nodes
        assert column(trees.tokens, trees, slot) == [node.token for node in nodes]
        assert column(trees.parents, trees, slot) == [node.parent for node in nodes]
        assert column(trees.depths, trees, slot) == [node.depth for node in nodes]
        assert column(trees.acceptances, trees, slot) == [node.acceptance for node in nodes]
        assert column(trees.sources, trees, slot)[1:] == [node.source for node in nodes[1:]]
        values = [tree.value(node) for node in range(len(nodes))]
        assert column(trees.values, trees, slot) == pytest.approx(values)
        masses = [sum(nodes[child].acceptance for child in tree.children(node)) for node in range(len(nodes))]
        assert column(trees.child_mass, trees, slot) == pytest.approx(masses)
        assert trees.root_positions[slot] == tree.root_position


@pytest.mark.parametrize("seed", range(24))
def test_many_trees_at_once_are_what_each_is_alone(seed: int) -> None:
    rng = random.Random(seed)
    num_slots, capacity = rng.choice([1, 2, 5]), rng.choice([7, 30, 256])
    trees, plain = GrowingTrees(num_slots, capacity), []
    slots, every = np.arange(num_slots), range(num_slots)
    for slot in every:
        plain.append(PlainTree(rng.randrange(9), 3 * slot, capacity))
        trees.start(slot, plain[slot].nodes[0].token, 3 * slot)

    def some_nodes(slot: int, at_most: int) -> list[int]:
        nodes = range(len(plain[slot].nodes))
        return rng.sample(nodes, min(len(nodes), rng.randint(1, at_most)))

    for _ in range(6):
        proposals = [
            (slot, parent, token, rng.uniform(0.01, 0.99), rng.randrange(50))
            for slot in rng.sample(every, rng.randint(1, num_slots))
            for parent in some_nodes(slot, 4)
            for token in rng.sample(range(6), 2)
        ]
        values = propose(trees, *proposals)
        nodes = [plain[slot].add_child(*proposal) for slot, *proposal in proposals]
        expected = [
            plain[p[0]].value(node) if node else 0.0 for p, node in zip(proposals, nodes, strict=True)
        ]
        assert values == pytest.approx(expected)
        assert_equal(trees, plain)

        chains = [
            (slot, below, rng.choices(range(4), k=5), rng.randint(0, 5))
            for slot in rng.sample(every, rng.randint(1, num_slots))
            for below in some_nodes(slot, 2)
        ]
        acceptances = [[rng.uniform(0.01, 0.99) for _ in range(5)] for _ in chains]
        sources = [[rng.randrange(50) for _ in range(5)] for _ in chains]
        owners, below, tokens, lengths = (np.array(part) for part in zip(*chains, strict=True))
        trees.add_chains(owners, below, tokens, lengths, np.array(acceptances), np.array(sources))
        for (slot, node, links, length), own, kinds in zip(chains, acceptances, sources, strict=True):
            plain[slot].add_chain(node, links[:length], own[:length], kinds[:length])
        assert_equal(trees, plain)

        most, deepest = (np.array([rng.randint(0, limit) for _ in every]) for limit in (12, 6))
        offers = trees.offers(slots, deepest, most)
        best = [plain[slot].best(int(most[slot]), int(deepest[slot])) for slot in every]
        assert [n[v > 0.0].tolist() for n, v in zip(offers.nodes, offers.values, strict=True)] == best
        counts = [rng.randint(0, len(nodes)) for nodes in best]
        found = trees.cut(slots, offers, ints(*counts))
        for slot in every:
            order = plain[slot].cut(best[slot][: counts[slot]])
            assert found.growing_nodes[slot][found.exists[slot]].tolist() == order
            parents = [order.index(plain[slot].nodes[node].parent) for node in order]
            assert found.parents[slot][found.exists[slot]].tolist() == parents
            assert found.tokens[slot][found.exists[slot]].tolist() == [
                plain[slot].nodes[n].token for n in order
            ]

        nodes = [(slot, node) for slot in every for node in some_nodes(slot, 3)]
        recent = np.array([[rng.randrange(100) for _ in range(5)] for _ in every])
        recent[:, -1] = trees.tokens[:, 0]
        owners, below = (np.array(part) for part in zip(*nodes, strict=True))
        tails = [[*recent[slot].tolist(), *plain[slot].path_tokens(node)][-5:] for slot, node in nodes]
        assert trees.tails(owners, below, recent[owners]).tolist() == tails

        chosen = sorted(rng.sample(every, rng.randint(1, num_slots)), reverse=True)
        lasts = [rng.randrange(len(plain[slot].nodes)) for slot in chosen]
        following = [rng.randrange(6) for _ in chosen]
        emitted = [plain[slot].nodes[last].depth + 1 for slot, last in zip(chosen, lasts, strict=True)]
        paths = [[0, *plain[slot].path(last)] for slot, last in zip(chosen, lasts, strict=True)]
        survivors = trees.reroot(ints(*chosen), ints(*lasts), ints(*following), ints(*emitted))
        left = [plain[slot].reroot(*of) for slot, *of in zip(chosen, lasts, following, emitted, strict=True)]
        assert survivors.has_old_root.tolist() == [bool(old) for old in left]
        for row, old in enumerate(left):
            assert np.flatnonzero(survivors.paths[row]).tolist() == paths[row]
            assert not old or survivors.old_nodes[row, : survivors.counts[row]].tolist() == old
        assert_equal(trees, plain)
