"""Literal sequences: the last tokens are looked up in everything before them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.ngram import NgramIndex, propose_ngrams
from outrider.workers.sequences.tree import GrowingTree

TWO = NgramConfig(min_match=2, max_match=4, max_candidates=2)


def look_up(
    tokens: list[int], max_length: int = 4, config: NgramConfig = TWO, path: tuple[int, ...] = ()
) -> list[tuple[int, list[int]]]:
    return NgramIndex(config).continuations(tokens, path, max_length)


def test_what_followed_the_last_tokens_before_is_proposed() -> None:
    #        1 2 | 3 4 5 6 ... 1 2 | ?
    assert look_up([1, 2, 3, 4, 5, 6, 1, 2]) == [(2, [3, 4, 5, 6])]


def test_nothing_is_proposed_where_nothing_repeats() -> None:
    assert look_up([1, 2, 3, 4, 5, 6]) == []
    assert look_up([1, 2, 3, 2]) == []  # one token alone is too short a match


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2]])
def test_short_sequences_propose_nothing(tokens: list[int]) -> None:
    assert look_up(tokens) == []


def test_the_longest_match_comes_first() -> None:
    #          9 1 2 | 3 3 3       1 2 | 4 4 4        9 1 2 | ?
    tokens = [9, 1, 2, 3, 3, 3, 8, 1, 2, 4, 4, 4, 7, 9, 1, 2]
    assert look_up(tokens, 3) == [(3, [3, 3, 3]), (2, [4, 4, 4])]


def test_among_equal_matches_the_most_recent_comes_first() -> None:
    tokens = [1, 2, 3, 8, 1, 2, 4, 9, 1, 2]
    assert look_up(tokens, 1) == [(2, [4]), (2, [3])]


def test_a_match_counts_at_most_max_match_tokens() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6]
    assert look_up(tokens, 2) == [(4, [7, 0])]
    assert look_up(tokens, 2, NgramConfig(2, 9, 2)) == [(6, [7, 0])]


def test_equal_continuations_are_one_candidate() -> None:
    tokens = [1, 2, 3, 8, 1, 2, 3, 9, 1, 2]
    assert look_up(tokens, 1) == [(2, [3])]
    assert look_up(tokens, 2) == [(2, [3, 9]), (2, [3, 8])]


def test_candidates_are_limited() -> None:
    tokens = [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2]
    assert look_up(tokens, 1) == [(2, [5]), (2, [4])]
    assert look_up(tokens, 1, NgramConfig(2, 4, 3)) == [(2, [5]), (2, [4]), (2, [3])]


def test_a_match_that_overlaps_the_end_repeats_with_its_period() -> None:
    assert look_up([7, 1, 1, 1], 4) == [(2, [1, 1, 1, 1])]
    #        1 2 1 2 1 | ? : two tokens back the text was the same
    assert look_up([1, 2, 1, 2, 1], 5)[0] == (3, [2, 1, 2, 1, 2])


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.integers(2, 4),
    st.integers(1, 12),
)
def test_periodic_text_is_continued_for_ever(period: list[int], repeats: int, max_length: int) -> None:
    tokens = period * (repeats + 2)
    _, follow = look_up(tokens, max_length, NgramConfig(2, 16, 2))[0]
    assert follow == [period[i % len(period)] for i in range(max_length)]


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(1, 40), max_size=4))
def test_an_index_that_grows_finds_what_a_fresh_one_finds(tokens: list[int], cuts: list[int]) -> None:
    grown = NgramIndex(TWO)
    for cut in sorted(cuts):
        grown.continuations(tokens[:cut], (), 3)
    assert grown.continuations(tokens, (), 3) == look_up(tokens, 3)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 4))
def test_every_candidate_did_follow_the_last_tokens(tokens: list[int], max_length: int) -> None:
    found = look_up(tokens, max_length)
    assert len(found) <= (2 if max_length else 0)
    for length, follow in found:
        assert 2 <= length <= 4
        assert len(follow) == max_length
        doubled = tuple(tokens[-length:] + follow[:1])
        assert any(tuple(tokens[i : i + length + 1]) == doubled for i in range(len(tokens)))


def test_proposals_enter_the_tree_below_its_root() -> None:
    tokens = [9, 1, 2, 3, 4, 3, 8, 1, 2, 3, 5, 5, 7, 9, 1, 2]
    tree = GrowingTree(2, 15)
    propose_ngrams(NgramIndex(TWO), tokens, tree, 0, 3, AcceptanceEstimator())
    # 3 is the next token of both; then they part.
    assert [(n.token, n.parent) for n in tree.nodes[1:]] == [(3, 0), (4, 1), (3, 2), (5, 1), (5, 4)]
    # The longer match is trusted more, and both more the longer they have held.
    assert tree.nodes[2].acceptance > tree.nodes[4].acceptance
    assert tree.nodes[3].acceptance > tree.nodes[1].acceptance


def test_proposals_are_no_deeper_than_asked() -> None:
    tree = GrowingTree(1, 4)
    propose_ngrams(NgramIndex(TWO), [1, 1, 1, 1, 1], tree, 0, 3, AcceptanceEstimator())
    assert [n.depth for n in tree.nodes] == [0, 1, 2, 3]
    tree = GrowingTree(1, 4)
    propose_ngrams(NgramIndex(TWO), [1, 1, 1, 1, 1], tree, 0, 0, AcceptanceEstimator())
    assert len(tree) == 1


def test_a_draft_path_is_looked_up_like_text() -> None:
    #        1 2 3 | 4 5       ... 9 and perhaps 2 3 | ?
    assert look_up([1, 2, 3, 4, 5, 9], 2, path=(2, 3)) == [(2, [4, 5])]
    assert look_up([1, 2, 3, 4, 5, 1], 2, path=(2, 3)) == [(3, [4, 5])]  # the match reaches into the text
    assert look_up([1, 2, 3, 4, 5, 9], 2, path=(3, 2)) == []


def test_a_match_that_reaches_a_draft_path_goes_round_through_it() -> None:
    # 4 1 2, perhaps 3 1 2: if so, 3 comes next, and 1 2 after it.
    assert look_up([4, 1, 2], 5, path=(3, 1, 2)) == [(2, [3, 1, 2, 3, 1])]
    assert look_up([4, 4, 1], 4, NgramConfig(1, 4, 2), path=(2, 1)) == [(1, [2, 1, 2, 1])]


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_a_path_is_continued_by_what_would_continue_it_as_text(tokens: list[int], path: list[int]) -> None:
    # Only matches inside the path are not found, as it is not indexed.
    every = NgramConfig(2, 4, 99)
    as_text = [follow for _, follow in look_up(tokens + path, 3, every)]
    assert all(follow in as_text for _, follow in look_up(tokens, 3, every, tuple(path)))


def test_a_lookup_below_a_leaf_continues_its_path() -> None:
    tree = GrowingTree(9, 5)
    two = tree.add_child(0, 2, 0.5, (1, 0))
    three = tree.add_child(two, 3, 0.5, (1, 0))
    propose_ngrams(NgramIndex(TWO), [1, 2, 3, 4, 5, 9], tree, three, 3, AcceptanceEstimator())
    assert [(n.token, n.parent, n.depth) for n in tree.nodes[3:]] == [(4, three, 3)]  # no deeper than 3
