"""Literal texts through the method: what is looked up, where it enters the trees, and what is trusted how much."""

from dataclasses import replace

import numpy as np
import pytest

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.ngram import NgramMethod
from outrider.workers.drafting.slots import DraftedSlots, Loosenesses
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.sequences.sequence import AcceptanceOptions, Sequence
from support.drafted import GREEDY, answer, cut_of, node_at, paths_of, sequence_of

TWO = NgramConfig(min_match=2, max_match=4, max_candidates=2)
#        1 2 | 3 4 5 6  1 2 | ?
PROMPT = [1, 2, 3, 4, 5, 6, 1, 2]


def engine_with(*sequences: Sequence, config: NgramConfig = TWO, num_slots: int = 4) -> DraftEngine:
    engine = DraftEngine(DraftedSlots(num_slots, 8, 6))
    engine.add(NgramMethod(engine.slots, engine.estimator, config))
    for sequence in sequences:
        engine.start(sequence)
    return engine


def looked_up(engine: DraftEngine, *slots: int) -> list[list[list[int]]]:
    """Paths in the trees of these slots after a lookup below them."""
    engine.look_up(np.array(slots, dtype=np.int64))
    return [paths_of(engine.trees, slot) for slot in slots]


def propose(engine: DraftEngine, slot: int, below: int, *tokens: int) -> None:
    """What another method found: a chain."""
    chain = np.array([tokens])
    estimates = np.full(chain.shape, 0.5), np.zeros(chain.shape, dtype=np.int64)
    engine.trees.add_chains(np.array([slot]), np.array([below]), chain, np.array([len(tokens)]), *estimates)


def test_trees_are_filled_each_to_the_depth_of_its_own_round() -> None:
    engine = engine_with(
        sequence_of(PROMPT, 3, max_depth=3),
        sequence_of([1, 2, 3, 4, 5, 6], 0),  # nothing repeats
        # The round emits one token more than it accepts.
        sequence_of(PROMPT, 2, sampling=replace(GREEDY, max_tokens=3)),
        sequence_of(PROMPT, 1, sampling=replace(GREEDY, max_tokens=1)),
    )
    assert looked_up(engine, 3, 0, 2, 1) == [[[3], [3, 4], [3, 4, 5]], [], [[3], [3, 4]], []]
    assert looked_up(engine) == []


def test_candidates_that_begin_alike_share_their_nodes_and_the_longer_match_is_trusted_more() -> None:
    # 1 2 3 5 5 follows 7 9, too: a longer match than that of 1 2 3 4 3.
    engine = engine_with(sequence_of([9, 1, 2, 3, 5, 5, 8, 1, 2, 3, 4, 3, 7, 9, 1, 2], max_depth=3))
    assert looked_up(engine, 0) == [[[3], [3, 5], [3, 5, 5], [3, 4], [3, 4, 3]]]
    first, second, third, other, behind = engine.trees.acceptances[0, 1:6].tolist()
    assert first < second < third  # the longer it holds
    assert other < second
    assert behind < third
    assert len(set(engine.trees.sources[0, 1:6].tolist())) == 5


def test_what_follows_a_path_is_found_below_it_and_only_once() -> None:
    engine = engine_with(sequence_of([1, 2, 3, 4, 5, 9]))
    propose(engine, 0, 0, 2, 3)
    assert looked_up(engine, 0) == [[[2], [2, 3], [2, 3, 4], [2, 3, 4, 5]]]
    assert not engine.methods[0].expand(np.array([0]))  # nothing was proposed since
    propose(engine, 0, node_at(engine.trees, 0, [2]), 9, 1, 2)
    assert looked_up(engine, 0)[0][4:] == [[2, 9], [2, 9, 1], [2, 9, 1, 2]]  # as deep as allowed


def test_the_root_and_a_leaf_that_find_the_same_share_it() -> None:
    # What follows 1 2 leads through 3, another method's; what follows 2 3 goes on alike.
    engine = engine_with(sequence_of(PROMPT))
    propose(engine, 0, 0, 3)
    assert looked_up(engine, 0) == [[[3], [3, 4], [3, 4, 5], [3, 4, 5, 6]]]
    # After a verdict the root and what survives are looked up again: one token further.
    sent = cut_of(engine.trees, {0: [1]})
    assert answer(engine, [0], sent, [{0: 3, 1: 4}]) == [[3, 4]]
    assert looked_up(engine, 0) == [[[5], [5, 6], [5, 6, 1], [5, 6, 1, 2]]]


def test_what_came_out_is_found_later() -> None:
    engine = engine_with(sequence_of([1, 2, 3], 1), sequence_of([1, 2], 0, methods=()))
    assert looked_up(engine, 1) == [[]]
    for token in (7, 8, 2, 3):
        answer(engine, [0, 1], cut_of(engine.trees, {0: [], 1: []}), [{0: token}, {0: token}])
        looked_up(engine, 0, 1)
    assert paths_of(engine.trees, 1) == [[7], [7, 8], [7, 8, 2], [7, 8, 2, 3]]
    assert paths_of(engine.trees, 0) == []  # it asks for no method


def test_a_slot_finds_nothing_of_the_text_that_had_it_before() -> None:
    engine = engine_with(first := sequence_of(PROMPT))
    engine.finish(first)
    engine.start(sequence_of([8, 1, 2]))
    assert looked_up(engine, 0) == [[]]
    engine.finish(engine.slots.sequence(0))
    engine.start(sequence_of([4, 4, 4]))
    assert looked_up(engine, 0) == [[[4], [4, 4], [4, 4, 4], [4, 4, 4, 4]]]


def test_a_full_tree_takes_what_fits() -> None:
    engine = engine_with(sequence_of(PROMPT))  # 64 nodes
    for below in range(31):
        propose(engine, 0, 0, 100 + below, 200)
    assert engine.trees.num_nodes[0] == 63
    assert looked_up(engine, 0)[0][62:] == [[3]]
    assert looked_up(engine, 0)[0][62:] == [[3]]


def test_estimates_learn_from_what_comes_out() -> None:
    config = NgramConfig(min_match=1, max_match=1, max_candidates=1)
    engine = engine_with(sequence_of([1, 2, 1], max_depth=1), config=config)
    (first,) = looked_up(engine, 0)[0]
    before = engine.trees.acceptances[0, 1]
    for _ in range(20):  # what followed last time is never right
        (found,) = looked_up(engine, 0)[0]
        answer(engine, [0], cut_of(engine.trees, {0: [1]}), [{0: 5 - found[0]}])
        answer(engine, [0], cut_of(engine.trees, {0: []}), [{0: 1}])
    looked_up(engine, 0)
    assert engine.trees.acceptances[0, 1] < before / 4 < 0.25
    assert first == [2]


def test_drafts_are_as_deep_as_the_rule_of_their_request_lets_them_pay() -> None:
    """The same text, drafted wrong every time: a judge with a low threshold keeps it all and sees longer drafts."""
    asked = (AcceptanceOptions(), *(AcceptanceOptions("judge", threshold=at) for at in (0.95, 0.5)))
    texts = [sequence_of(PROMPT, slot, max_depth=4, acceptance=options) for slot, options in enumerate(asked)]
    engine = engine_with(*texts)
    whole = [[3], [3, 4], [3, 4, 5], [3, 4, 5, 6]]
    assert looked_up(engine, 0, 1, 2) == [whole] * 3
    sources = engine.trees.sources[2, 1:5]
    for _ in range(20):
        for slot, is_kept in enumerate((False, False, True)):
            engine.estimator.observe(sources, np.full(4, is_kept), engine.slots.rules[[slot] * 4])
    for sequence in texts:
        engine.finish(sequence)
        engine.start(sequence)
    assert looked_up(engine, 0, 1, 2) == [whole] * 3
    cost = CostModel(PassProfile((1, 5), (1.0, 1.4)))
    depths = [cost.best_num_nodes(engine.trees.values[slot, 1:5], 1, 1, 0.0) for slot in range(3)]
    assert depths == [0, 0, 4]


def test_how_loosely_drafts_are_accepted_is_told_by_rule_and_measure() -> None:
    kinds = Loosenesses(("exact", "typical", "judge"))
    asked = [
        AcceptanceOptions(),
        *(AcceptanceOptions("typical", epsilon=epsilon) for epsilon in (0.09, 0.1, 0.3, 0.5)),
        *(AcceptanceOptions("judge", threshold=threshold) for threshold in (0.5, 0.7, 0.85, 0.9, 1.0)),
    ]
    assert [kinds.kind_of(options) for options in asked] == list(range(len(kinds))) == list(range(10))
    assert len(Loosenesses(("exact",))) == 1


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_texts_shorter_than_a_match_propose_nothing(num_tokens: int) -> None:
    engine = engine_with(sequence_of(range(num_tokens)))
    assert looked_up(engine, 0) == [[]]
