"""All methods in one tree, and what a verdict teaches."""

import pytest

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine, drafted_by_model
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import Verdict
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence
from outrider.workers.sequences.tree import DraftTree, GrowingTree
from support.scripted import ScriptedDrafter

#         1 2 | 3 4 5 6  1 2 | ?
PROMPT = (1, 2, 3, 4, 5, 6, 1, 2)


def sequence_of(
    prompt: tuple[int, ...] = PROMPT,
    methods: tuple[str, ...] = ("ngram",),
    max_nodes: int = 8,
    max_depth: int = 4,
    max_tokens: int = 100,
    request_id: str = "a",
) -> Sequence:
    options = DraftOptions(methods, max_nodes, max_depth)
    request = Request(request_id, prompt, SamplingParams(max_tokens=max_tokens), options)
    tree = GrowingTree(prompt[-1], len(prompt) - 1)
    return Sequence(request, list(prompt), tree=tree, sent_tree=DraftTree.root_only(prompt[-1]))


def engine_with(*sequences: Sequence, drafter: bool = False) -> DraftEngine:
    engine = DraftEngine(NgramConfig(min_match=2, max_match=4))
    if drafter:
        engine.add(ScriptedDrafter(0.0, lambda position: True, engine.estimator))
    for sequence in sequences:
        engine.start(sequence)
    return engine


def tokens_of(tree: GrowingTree) -> list[list[int]]:
    """Paths of all nodes below the root."""
    return [tree.path_tokens(node) for node in range(1, len(tree))]


def test_lookup_fills_the_tree_to_its_depth() -> None:
    sequence = sequence_of(max_depth=3)
    engine_with(sequence).look_up([sequence])
    assert tokens_of(sequence.tree) == [[3], [3, 4], [3, 4, 5]]


def test_lookup_goes_no_deeper_than_the_text_will() -> None:
    sequence = sequence_of(max_tokens=3)
    engine_with(sequence).look_up([sequence])
    assert tokens_of(sequence.tree) == [[3], [3, 4]]  # the round emits one more than it accepts


def test_lookup_continues_what_other_methods_proposed() -> None:
    sequence = sequence_of((1, 2, 3, 4, 5, 9), methods=("ngram", "model"))
    node = sequence.tree.add_child(0, 2, 0.5, (1, 0))
    sequence.tree.add_child(node, 3, 0.5, (1, 0))
    engine_with(sequence).look_up([sequence])
    assert tokens_of(sequence.tree) == [[2], [2, 3], [2, 3, 4], [2, 3, 4, 5]]


def test_methods_that_agree_share_their_nodes() -> None:
    sequence = sequence_of(methods=("ngram", "model"), max_depth=2)
    model_node = sequence.tree.add_child(0, 3, 0.01, (1, 0))
    engine_with(sequence).look_up([sequence])
    assert tokens_of(sequence.tree) == [[3], [3, 4]]
    assert sequence.tree.nodes[model_node].source[0] == 0  # lookup is surer


@pytest.mark.parametrize(
    ("methods", "max_nodes", "by_lookup", "by_model"),
    [
        (("ngram",), 8, True, False),
        (("model",), 8, False, True),
        (("ngram", "model"), 8, True, True),
        ((), 8, False, False),
        (("model",), 0, False, False),
    ],
)
def test_each_request_is_drafted_by_its_own_methods(
    methods: tuple[str, ...], max_nodes: int, by_lookup: bool, by_model: bool
) -> None:
    sequence = sequence_of(methods=methods, max_nodes=max_nodes)
    assert drafted_by_model([sequence]) == ([sequence] if by_model else [])
    engine_with(sequence).look_up([sequence])
    assert (len(sequence.tree) > 1) == by_lookup


def test_a_sequence_that_comes_back_keeps_its_drafter_state() -> None:
    # Its pages were taken away in the target; the drafter's own are untouched.
    starts, finishes = [], []

    class Counting(ScriptedDrafter):
        def start(self, sequence: Sequence) -> None:
            starts.append(sequence.id)

        def finish(self, sequence: Sequence) -> None:
            finishes.append(sequence.id)

    engine = DraftEngine(NgramConfig())
    engine.add(Counting(0.0, lambda position: True, engine.estimator))
    sequence = sequence_of()
    engine.finish(sequence)  # cancelled before it ran
    engine.start(sequence)
    engine.start(sequence)
    engine.finish(sequence)
    engine.finish(sequence)
    assert (starts, finishes) == (["a"], ["a"])


class RecordingEstimator(AcceptanceEstimator):
    """Keeps what was observed."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[tuple[int, ...], bool]] = []

    def observe(self, source: tuple[int, ...], accepted: bool) -> None:
        self.observed.append((source, accepted))
        super().observe(source, accepted)


def settled(sent: list[int], path: tuple[int, ...], next_token: int) -> list[tuple[tuple[int, ...], bool]]:
    """What is learned from a verdict on this tree, whose nodes have sources named after their tokens:

    node 0 ─┬─ 1 = 11 ─┬─ 3 = 13
            │          └─ 4 = 14
            └─ 2 = 12 ─── 5 = 15
    """
    sequence = sequence_of()
    engine = engine_with(sequence)
    engine.estimator = estimator = RecordingEstimator()
    for parent, token, acceptance in ((0, 11, 0.8), (0, 12, 0.1), (1, 13, 0.5), (1, 14, 0.3), (2, 15, 0.2)):
        sequence.tree.add_child(parent, token, acceptance, (token,))
    sequence.sent_tree = sequence.tree.cut(sent)
    verdict = Verdict(path, next_token)
    sequence.tokens += verdict.emitted(sequence.sent_tree)
    engine.settle(sequence, verdict)
    return sorted(estimator.observed)


def test_every_proposal_below_an_accepted_node_met_its_answer() -> None:
    assert settled([1, 2, 3, 4, 5], path=(0, 1), next_token=99) == [
        ((11,), True),
        ((12,), False),
        ((13,), False),
        ((14,), False),
    ]


def test_proposals_below_a_refused_node_teach_nothing() -> None:
    assert settled([1, 2, 3, 4, 5], path=(0,), next_token=99) == [((11,), False), ((12,), False)]


def test_a_proposal_that_was_not_sent_is_judged_as_well() -> None:
    # Only 11 was verified, and the target went on with 14, which was not worth a row.
    assert settled([1], path=(0, 1), next_token=14) == [
        ((11,), True),
        ((12,), False),
        ((13,), False),
        ((14,), True),
    ]
