"""Trees written out by hand. The running example, value (= product of acceptances) below each token:

10 ─┬─ 11 ─┬─ 13 ── 15          node 0 = 10, 1 = 11, 2 = 12, 3 = 13, 4 = 14, 5 = 15
    │ 0.8  │ 0.4    0.36
    │      └─ 14
    │        0.16
    └─ 12
      0.2
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.workers.sequences.tree import DraftTree, GrowingTree


def example() -> GrowingTree:
    tree = GrowingTree(root_token=10, root_position=7)
    assert tree.add_child(0, 11, 0.8, (1, 0)) == 1
    assert tree.add_child(0, 12, 0.2, (1, 1)) == 2
    assert tree.add_child(1, 13, 0.5, (1, 0)) == 3
    assert tree.add_child(1, 14, 0.2, (1, 1)) == 4
    assert tree.add_child(3, 15, 0.9, (1, 0)) == 5
    return tree


def test_value_is_the_product_along_the_path() -> None:
    tree = example()
    assert [node.value for node in tree.nodes] == pytest.approx([1.0, 0.8, 0.2, 0.4, 0.16, 0.36])
    assert [node.depth for node in tree.nodes] == [0, 1, 1, 2, 2, 3]
    assert [node.position for node in tree.nodes] == [7, 8, 8, 9, 9, 10]
    assert tree.path_tokens(5) == [11, 13, 15]
    assert tree.path_tokens(0) == []


def test_a_token_proposed_twice_is_one_node_with_the_better_estimate() -> None:
    tree = example()
    assert tree.add_child(0, 11, 0.5, (0, 3)) == 1  # another method is less sure: nothing changes
    assert tree.nodes[1].source == (1, 0)
    assert tree.add_child(0, 12, 0.6, (0, 3)) == 2
    assert (tree.nodes[2].acceptance, tree.nodes[2].source) == (0.6, (0, 3))
    assert len(tree) == 6


def test_a_better_estimate_raises_everything_below() -> None:
    tree = example()
    tree.add_child(1, 13, 1.0, (0, 3))
    assert tree.nodes[3].value == pytest.approx(0.8)
    assert tree.nodes[5].value == pytest.approx(0.72)
    assert tree.nodes[4].value == pytest.approx(0.16)


def test_trees_of_two_methods_merge_where_they_agree() -> None:
    tree = example()
    node = 0
    for token in (11, 13, 16):  # a lookup that agrees on two tokens
        node = tree.add_child(node, token, 0.4, (0, 0, 2))
    assert node == 6
    assert (tree.nodes[6].parent, tree.nodes[6].depth) == (3, 3)
    assert tree.nodes[6].value == pytest.approx(0.16)


@pytest.mark.parametrize(
    ("max_nodes", "max_depth", "best"),
    [
        (9, 9, [1, 3, 5, 2, 4]),
        (3, 9, [1, 3, 5]),
        (9, 2, [1, 3, 2, 4]),
        (9, 1, [1, 2]),
        (0, 9, []),
        (9, 0, []),
    ],
)
def test_best_takes_the_most_valuable_nodes_within_the_limits(
    max_nodes: int, max_depth: int, best: list[int]
) -> None:
    assert example().best(max_nodes, max_depth) == best


def test_equal_values_keep_parents_before_children() -> None:
    tree = GrowingTree(1, 0)
    for parent in range(4):
        tree.add_child(parent, parent + 2, 1.0, ())
    assert tree.best(9, 9) == [1, 2, 3, 4]


def test_cut_is_depth_first_with_the_likeliest_path_behind_the_root() -> None:
    tree = example()
    assert tree.cut([1, 3, 5, 2, 4]) == DraftTree(
        tokens=(10, 11, 13, 15, 14, 12),
        parents=(0, 0, 1, 2, 1, 0),
        growing_nodes=(0, 1, 3, 5, 4, 2),
    )
    assert tree.cut([1, 3, 2]) == DraftTree((10, 11, 13, 12), (0, 0, 1, 0), (0, 1, 3, 2))
    assert tree.cut([]) == DraftTree.root_only(10)


def test_a_cut_knows_its_depths_and_its_size() -> None:
    cut = example().cut([1, 3, 5, 2, 4])
    assert cut.depths() == [0, 1, 2, 3, 2, 1]
    assert cut.num_drafted == 5
    assert DraftTree.root_only(10).num_drafted == 0


def test_rerooting_keeps_what_hangs_below_the_tokens_that_came_out() -> None:
    tree = example()
    survivors = tree.reroot([11, 13])
    assert survivors == {3: 0, 5: 1}
    root, child = tree.nodes
    assert (root.token, root.parent, root.depth, root.value, root.position) == (13, 0, 0, 1.0, 9)
    assert (child.token, child.parent, child.depth, child.value, child.position) == (15, 0, 1, 0.9, 10)
    assert (root.children, child.children) == ({15: 1}, {})


def test_rerooting_numbers_survivors_breadth_first() -> None:
    tree = example()
    assert tree.reroot([11]) == {1: 0, 3: 1, 4: 2, 5: 3}
    assert [(n.token, n.parent, n.depth) for n in tree.nodes] == [
        (11, 0, 0),
        (13, 0, 1),
        (14, 0, 1),
        (15, 1, 2),
    ]
    assert [node.value for node in tree.nodes] == pytest.approx([1.0, 0.5, 0.2, 0.45])


def test_a_token_that_was_not_proposed_starts_the_tree_afresh() -> None:
    for emitted, position in (([99], 8), ([11, 13, 99], 10)):
        tree = example()
        assert tree.reroot(emitted) == {}
        (root,) = tree.nodes
        assert (root.token, root.position, root.children, root.value) == (emitted[-1], position, {}, 1.0)


def test_a_leaf_that_came_out_is_a_root_without_children() -> None:
    tree = example()
    assert tree.reroot([12]) == {2: 0}
    assert [node.token for node in tree.nodes] == [12]


def test_a_rerooted_tree_grows_on() -> None:
    tree = example()
    tree.reroot([11])
    assert tree.add_child(3, 17, 0.5, (1, 0)) == 4
    assert tree.path_tokens(4) == [13, 15, 17]
    assert tree.nodes[4].position == 11
    assert tree.cut(tree.best(9, 9)).tokens == (11, 13, 15, 17, 14)


@st.composite
def random_trees(draw: st.DrawFn) -> GrowingTree:
    tree = GrowingTree(0, 0)
    for _ in range(draw(st.integers(0, 25))):
        parent = draw(st.integers(0, len(tree) - 1))
        tree.add_child(parent, draw(st.integers(0, 3)), draw(st.floats(0.001, 0.995)), ())
    return tree


@given(random_trees(), st.integers(0, 12), st.integers(0, 5))
def test_every_cut_is_a_tree_in_depth_first_order(tree: GrowingTree, max_nodes: int, max_depth: int) -> None:
    chosen = tree.best(max_nodes, max_depth)
    values = [tree.nodes[n].value for n in chosen]
    assert values == sorted(values, reverse=True)
    cut = tree.cut(chosen)
    assert sorted(cut.growing_nodes) == sorted([0, *chosen])  # all of them: no child without its parent
    assert max(cut.depths()) <= max_depth
    path = [0]  # from the root to the node before
    for node in range(1, len(cut.tokens)):
        assert cut.parents[node] in path  # depth first: a parent is the node before or one above it
        path = [*path[: path.index(cut.parents[node]) + 1], node]
        old = cut.growing_nodes[node]
        assert cut.tokens[node] == tree.nodes[old].token
        assert cut.growing_nodes[cut.parents[node]] == tree.nodes[old].parent


@given(random_trees(), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_rerooting_keeps_every_path_below_the_new_root(tree: GrowingTree, emitted: list[int]) -> None:
    def paths(of: GrowingTree) -> dict[tuple[int, ...], float]:
        return {tuple(of.path_tokens(n)): of.nodes[n].acceptance for n in range(1, len(of))}

    count = len(emitted)
    below = {p[count:]: a for p, a in paths(tree).items() if p[:count] == tuple(emitted) and len(p) > count}
    tree.reroot(emitted)
    assert paths(tree) == below
    assert [node.position - node.depth for node in tree.nodes] == [count] * len(tree)
    for index, node in enumerate(tree.nodes[1:], start=1):
        assert node.parent < index
        assert node.value == pytest.approx(tree.nodes[node.parent].value * node.acceptance)
