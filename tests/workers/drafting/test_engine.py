"""Several methods in one tree, each for those that ask for it, and what a verdict teaches."""

import numpy as np
import pytest

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod, Forecast, MethodContext, Verified
from outrider.workers.drafting.ngram import NgramMethod
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import Verdicts
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Bools, DraftTrees, Floats, Ints, Survivors
from support.drafted import answer, children_of, cut_of, paths_of, sequence_of

#         1 2 | 3 4 5 6  1 2 | ?
PROMPT = (1, 2, 3, 4, 5, 6, 1, 2)


class Toy(DraftMethod):
    """Proposes one token below each root that has no child with it, and writes down what it is told."""

    name = "toy"
    needs = HiddenNeeds((3,))

    def __init__(self, engine: DraftEngine, token: int = 3, acceptance: float = 0.01) -> None:
        super().__init__(engine.slots, engine.estimator)
        self._proposal = (token, acceptance)
        self._source = engine.estimator.reserve(1)
        self.told: list[tuple[str, list[int]]] = []

    @classmethod
    def build(cls, context: MethodContext) -> "Toy":
        return cls(DraftEngine(context.slots))

    def prefix_kept(self, sequence: Sequence) -> int:
        return 2

    def start(self, sequence: Sequence) -> None:
        self.told.append(("start", [sequence.slot]))

    def finish(self, sequence: Sequence) -> None:
        self.told.append(("finish", [sequence.slot]))

    def forecast(self, slots: Ints) -> Forecast:
        return Forecast(np.full(len(slots), 0.5), len(slots), slots)

    def expand(self, slots: Ints) -> bool:
        new = slots[self.trees.num_nodes[slots] == 1]
        token, acceptance = self._proposal
        fill = np.ones(len(new), dtype=np.int64)
        self.trees.add_children(new, 0 * fill, token * fill, acceptance * fill, self._source * fill)
        return bool(len(new))

    def observe(self, verified: Verified) -> None:
        self.told.append(("observe", [step.sequence.slot for step in verified.steps]))

    def rerooted(self, survivors: Survivors) -> None:
        self.told.append(("rerooted", survivors.slots.tolist()))

    def survival(self, slots: Ints, sent: DraftTrees) -> float:
        assert sent.tokens[:, 0].tolist() == self.trees.tokens[slots, 0].tolist()
        return float(len(slots))

    def root_gains(self, laws: Ints) -> Floats:
        return np.where(laws % 2, 0.25, 0.5)


def engine_with(*sequences: Sequence) -> tuple[DraftEngine, Toy]:
    engine = DraftEngine(DraftedSlots(8, 8, 16))
    engine.add(NgramMethod(engine.slots, engine.estimator, NgramConfig(min_match=2, max_match=4)))
    engine.add(toy := Toy(engine))
    for sequence in sequences:
        engine.start(sequence)
    return engine, toy


WAYS = (("ngram",), ("toy",), ("ngram", "toy"), (), ("another",))


def in_all_ways() -> list[Sequence]:
    """One sequence for each of WAYS, and in slot 5 plain decoding with all methods."""
    sequences = [sequence_of(PROMPT, slot, methods) for slot, methods in enumerate(WAYS)]
    return [*sequences, sequence_of(PROMPT, 5, ("ngram", "toy"), max_nodes=0)]


def test_each_request_is_drafted_by_its_own_methods() -> None:
    engine, toy = engine_with(*in_all_ways())
    slots = np.arange(6)
    engine.look_up(slots)
    chain = [[3], [3, 4], [3, 4, 5], [3, 4, 5, 6]]
    assert [paths_of(engine.trees, slot) for slot in slots] == [chain, [], chain, [], [], []]
    ((method, forecast),) = engine.forecasts(slots)
    assert (method, forecast.slots.tolist()) == (toy, [1, 2])
    assert engine.expand(toy, slots)
    assert [paths_of(engine.trees, slot) for slot in slots] == [chain, [[3]], chain, [], [], []]
    assert not engine.expand(toy, slots)
    assert engine.survival(toy, slots[::-1], DraftTrees.roots(engine.trees.tokens[slots[::-1], 0])) == 2.0
    assert engine.survival(toy, slots[3:], DraftTrees.roots(engine.trees.tokens[slots[3:], 0])) == 0.0
    assert engine.forecasts(slots[3:]) == []


def test_methods_hear_of_their_own_sequences_only() -> None:
    sequences = in_all_ways()
    engine, toy = engine_with(*sequences)
    slots = [5, 4, 3, 2, 1, 0]
    sent = cut_of(engine.trees, {slot: [] for slot in slots})
    assert answer(engine, slots, sent, [{0: 10 + slot} for slot in slots]) == [[10 + slot] for slot in slots]
    answer(engine, [0, 3], sent.rows(np.array([5, 2])), [{0: 9}, {0: 9}])
    for sequence in sequences:
        engine.finish(sequence)
        engine.finish(sequence)  # cancelled meanwhile
    assert toy.told == [
        ("start", [1]),
        ("start", [2]),
        ("observe", [2, 1]),
        ("rerooted", [2, 1]),
        ("finish", [1]),
        ("finish", [2]),
    ]
    # Nothing of it is left when a slot is given to somebody else.
    engine.start(sequence_of(PROMPT, 1, ("ngram",)))
    assert not engine.expand(toy, np.array([1]))


def test_the_tree_and_the_last_tokens_follow_every_verdict() -> None:
    engine, _ = engine_with(*in_all_ways())
    engine.look_up(np.arange(6))
    sent = cut_of(engine.trees, {0: [1, 2], 2: [1], 5: []})
    assert answer(engine, [0, 2, 5], sent, [{0: 3, 1: 4, 2: 5}, {0: 3, 1: 9}, {0: 7}]) == [
        [3, 4, 5],
        [3, 9],
        [7],
    ]
    assert [paths_of(engine.trees, slot) for slot in (0, 2, 5)] == [[[6]], [], []]
    assert engine.trees.root_positions[:6].tolist() == [10, 7, 9, 7, 7, 8]
    assert engine.slots.recent[0].tolist() == [0] * 5 + [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]
    assert engine.slots.recent[1].tolist() == [0] * 8 + list(PROMPT)
    assert engine.slots.num_tokens[:6].tolist() == [11, 8, 10, 8, 8, 9]
    assert engine.slots.num_remaining[:6].tolist() == [997, 1000, 998, 1000, 1000, 999]
    engine.settle(
        np.zeros(0, dtype=np.int64), sent.rows(np.zeros(0, dtype=np.int64)), None
    )  # nothing goes on


def test_more_tokens_than_are_remembered_may_come_at_once() -> None:
    slots = DraftedSlots(1, 8, 3)
    slots.start(sequence := sequence_of([1, 2, 3, 4]))
    assert slots.recent.tolist() == [[2, 3, 4]]
    slots.extend(sequence, [5])
    assert slots.recent.tolist() == [[3, 4, 5]]
    slots.extend(sequence, [6, 7, 8, 9])
    assert slots.recent.tolist() == [[7, 8, 9]]
    slots.start(sequence_of([5]))
    assert slots.recent.tolist() == [[0, 0, 5]]


def test_methods_that_agree_share_their_nodes() -> None:
    engine, toy = engine_with(sequence_of(PROMPT, 1, ("ngram", "toy"), max_depth=2))
    engine.expand(toy, np.array([1]))  # lookup follows, and is surer
    assert paths_of(engine.trees, 1) == [[3], [3, 4]]
    assert engine.trees.acceptances[1, 1] > 0.1


def test_what_sequences_need_is_what_their_methods_need() -> None:
    sequences = in_all_ways()
    engine, toy = engine_with(*sequences)
    assert [engine.prefix_kept(sequence) for sequence in sequences] == [8, 2, 2, 8, 8, 8]
    assert [engine.hidden_needs(sequence) for sequence in sequences] == [
        [],
        [toy.needs],
        [toy.needs],
        [],
        [],
        [],
    ]
    assert [need.layers for need in engine.needs()] == [(), (3,)]
    sampled = sequence_of(PROMPT, 6, ("toy",), sampling=SamplingParams(temperature=1.0))
    assert engine.root_gains(toy, [*sequences, sampled]).tolist() == [0.5, 0.25, 0.25]
    assert engine.root_gains(toy, sequences[3:]).tolist() == []


class RecordingEstimator(AcceptanceEstimator):
    """Keeps what was observed."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[int, bool]] = []

    def observe(self, sources: Ints, accepted: Bools, rules: Ints) -> None:
        self.observed += zip(sources.tolist(), accepted.tolist(), strict=True)


#   node 0 ─┬─ 1 = 11 ─┬─ 3 = 13          sources are named after the tokens, 50 more from slot to slot
#           │          └─ 4 = 14
#           └─ 2 = 12 ─── 5 = 15
BELOW = ((0, 11, 0.8), (0, 12, 0.1), (1, 13, 0.5), (1, 14, 0.3), (2, 15, 0.2))


def learned(said: dict[int, dict[int, int]], sent: list[int]) -> dict[int, list[tuple[int, bool]]]:
    """What verdicts on this tree in these slots teach, by slot; token 0 is said after the other nodes."""
    engine, _ = engine_with(*[sequence_of(PROMPT, slot, ()) for slot in (0, *said)])
    engine.estimator = estimator = RecordingEstimator()
    for node in range(
        9
    ):  # a longer tree beside them, which makes their arrays wider; its root's child is not met
        engine.trees.add_children(*(np.array([value]) for value in (0, node, 3, 0.5, 1)))
    for slot in said:
        for parent, token, acceptance in BELOW:
            engine.trees.add_children(
                np.array([slot]),
                np.array([parent]),
                np.array([token]),
                np.array([acceptance]),
                np.array([token + 50 * slot]),
            )
    sent_trees = cut_of(engine.trees, {0: [], **dict.fromkeys(said, sent)})
    answer(engine, [0, *said], sent_trees, [{}, *said.values()])
    assert estimator.observed.count((1, False)) == 1
    assert len(estimator.observed) == 1 + sum(source >= 50 for source, _ in estimator.observed)
    return {
        slot: sorted((source - 50 * slot, hit) for source, hit in estimator.observed if source // 50 == slot)
        for slot in said
    }


def test_every_proposal_below_an_accepted_node_met_its_answer() -> None:
    assert learned({2: {0: 11, 1: 99}, 1: {0: 11, 1: 14}, 3: {0: 99}}, sent=[1, 3, 2, 5, 4]) == {
        2: [(11, True), (12, False), (13, False), (14, False)],
        1: [(11, True), (12, False), (13, False), (14, True)],
        3: [(11, False), (12, False)],  # below a refused node nothing is learned
    }


def test_a_proposal_that_was_not_sent_is_judged_as_well() -> None:
    # Only 11 was verified, and the target went on with 14, which was not worth a row; or nothing was.
    assert learned({1: {0: 11, 1: 14}}, sent=[1]) == {
        1: [(11, True), (12, False), (13, False), (14, True)],
    }
    assert learned({1: {0: 12}}, sent=[]) == {1: [(11, False), (12, True)]}


def test_a_token_that_a_rule_kept_counts_as_the_answer() -> None:
    engine, _ = engine_with(sequence_of(PROMPT, 1, ()))
    engine.estimator = estimator = RecordingEstimator()
    for token, source in ((11, 4), (12, 5)):
        engine.trees.add_children(
            np.array([1]), np.array([0]), np.array([token]), np.array([0.5]), np.array([source])
        )
    sent = cut_of(engine.trees, {1: [2]})
    kept = Verdicts(
        np.array([[0, 1, 0]]),
        np.array([1]),
        np.array([7]),
        np.array([[False, True, False]]),
        np.array([False]),
        np.zeros((1, 3)),
    )
    engine.settle(np.array([1]), sent, kept)
    assert sorted(estimator.observed) == [(4, False), (5, True)]
    assert engine.trees.tokens[1, 0] == 7


@pytest.mark.parametrize("is_known", [True, False])
def test_a_proposal_of_the_next_token_survives(is_known: bool) -> None:
    engine, toy = engine_with(sequence_of(PROMPT, 1, ("toy",)))
    engine.expand(toy, np.array([1]))
    answer(engine, [1], cut_of(engine.trees, {1: []}), [{0: 3 if is_known else 4}])
    assert engine.trees.sources[1, 0] == (toy._source if is_known else 0)
    assert children_of(engine.trees, 1) == []
