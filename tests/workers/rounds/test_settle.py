"""What a verdict makes of a sequence. The tree of most examples, nodes numbered as they are sent:

node 0 = 10 ─┬─ 1 = 11 ─── 2 = 13
             └─ 3 = 12
"""

from collections.abc import Sequence as SequenceABC
from dataclasses import replace

import numpy as np
import pytest

from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod, MethodContext, Verified
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.messages import Scores
from outrider.workers.rounds.outgoing import Round
from outrider.workers.rounds.scheduler import PlannedStep
from outrider.workers.rounds.settle import settle_round
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import EXACT, Rule
from outrider.workers.sequences.sequence import (
    NO_TREE,
    DraftOptions,
    Request,
    RoundTree,
    Sequence,
    TokenEvent,
    TokenLogprobs,
)
from outrider.workers.sequences.tree import DraftTrees, Ints
from support.steps import scores_of
from support.toy_rules import EverySecond

T, D, K = Origin.TARGET, Origin.DRAFT, Origin.KEPT


class Recorder(DraftMethod):
    """Remembers what it was told."""

    name = "recorder"

    def __init__(self, slots: DraftedSlots, estimator: AcceptanceEstimator) -> None:
        super().__init__(slots, estimator)
        self.source = estimator.reserve(1)
        self.verified: list[Verified] = []

    @classmethod
    def build(cls, context: MethodContext) -> "Recorder":
        return cls(context.slots, context.estimator)

    def expand(self, slots: Ints) -> bool:
        return False

    def observe(self, verified: Verified) -> None:
        self.verified.append(verified)


class Deciding:
    """Sequences with the prompt 8 9 10, of which 8 and 9 are committed; the tree above is under verification."""

    def __init__(self, *samplings: SamplingParams) -> None:
        slots = DraftedSlots(max(1, len(samplings)), 8, 8)
        self.drafting = DraftEngine(slots)
        self.method = Recorder(slots, self.drafting.estimator)
        self.drafting.add(self.method)
        self.sequences = []
        for slot, sampling in enumerate(samplings or [SamplingParams()]):
            request = Request(f"{slot}", (8, 9, 10), sampling, DraftOptions((Recorder.name,), 8, 8))
            self.sequences.append(Sequence(request, [8, 9, 10], num_committed=2, slot=slot))
            self.drafting.start(self.sequences[-1])
            for parent, token in ((0, 11), (1, 13), (0, 12)):
                self.grow(parent, token, slot)
        self.sequence = self.sequences[0]

    def grow(self, parent: int, token: int, slot: int = 0) -> None:
        self.drafting.trees.add_children(
            *(np.array([value]) for value in (slot, parent, token, 0.5, self.method.source))
        )

    def tree(self, slot: int = 0) -> list[tuple[int, int]]:
        """(depth, token) of the nodes."""
        trees = self.drafting.trees
        count = trees.num_nodes[slot]
        return list(
            zip(trees.depths[slot, :count].tolist(), trees.tokens[slot, :count].tolist(), strict=True)
        )

    def settle(
        self,
        scores: Scores,
        chain_lengths: SequenceABC[int] = (),
        rules: SequenceABC[Rule] = (),
        num_nodes: int = 4,
    ) -> list[TokenEvent]:
        """num_nodes: of the tree, the first ones; no tree where the chain is not at the text's end."""
        chains = chain_lengths or [1] * len(self.sequences)
        steps = tuple(PlannedStep(s, length) for s, length in zip(self.sequences, chains, strict=True))
        counts = np.array([num_nodes if step.reaches_end else 0 for step in steps])
        roots = [s.tokens[-1] for s in self.sequences]
        trees = DraftTrees(
            counts,
            np.array([[root, 11, 13, 12][:num_nodes] for root in roots]),
            np.array([[0, 0, 1, 0][:num_nodes]] * len(roots)),
            np.array([[0, 1, 2, 3][:num_nodes]] * len(roots)),
        )
        lengths = np.array(chains)
        nodes = lengths + np.maximum(counts - 1, 0)
        known = np.array([s.num_committed for s in self.sequences])
        round_ = Round(1, 0, steps, trees, lengths, known, nodes, (), 0.0)
        outcomes = settle_round(round_, scores, rules or [EXACT] * len(steps), self.drafting)
        assert [outcome.sequence for outcome in outcomes] == self.sequences
        return [outcome.event for outcome in outcomes]


def settled(deciding: Deciding, *tokens: int, chain_length: int = 1, num_nodes: int = 4) -> TokenEvent:
    (event,) = deciding.settle(scores_of(1, tokens), [chain_length], num_nodes=num_nodes)
    return event


def test_accepted_tokens_join_the_text_and_their_rows_are_kept() -> None:
    deciding = Deciding()
    sequence = deciding.sequence
    event = settled(deciding, 11, 13, 20, 99)
    assert event.tokens == (11, 13, 20)
    assert event.origins == (D, D, T)
    assert (event.finish_reason, event.error, event.logprobs) == ("", "", ())
    assert sequence.tokens == [8, 9, 10, 11, 13, 20]
    assert sequence.pending_accepted == (0, 1, 2)
    assert sequence.num_committed == 5
    assert sequence.num_uncommitted == 1  # the target's own token has no row yet
    assert deciding.tree() == [(0, 20)]


def test_an_event_tells_the_tree_of_its_round_if_the_request_asked() -> None:
    plain, asked, short = SamplingParams(), SamplingParams(), SamplingParams(max_tokens=1)
    deciding = Deciding(plain, asked, short)
    for sequence in deciding.sequences[1:]:
        sequence.request = replace(sequence.request, draft=replace(sequence.request.draft, tree=True))
    untold, whole, cut = deciding.settle(scores_of(1, [11, 13, 20, 99] * 3))
    assert untold.tree == NO_TREE
    assert whole.tree == RoundTree((10, 11, 13, 12), (0, 0, 1, 0), (1, 2))
    assert (cut.tokens, cut.tree) == ((11,), replace(whole.tree, accepted=(1,)))


def test_a_tree_of_its_root_alone_is_told_as_such() -> None:
    deciding = Deciding()
    request = deciding.sequence.request
    deciding.sequence.request = replace(request, draft=replace(request.draft, tree=True))
    assert settled(deciding, 11, num_nodes=1).tree == RoundTree((10,), (0,), ())


def test_rows_of_a_second_branch_are_named_as_they_were_sent() -> None:
    deciding = Deciding()
    sequence = deciding.sequence
    assert settled(deciding, 12, 99, 99, 22).tokens == (12, 22)
    assert sequence.pending_accepted == (0, 3)


def test_a_tree_below_the_end_of_a_chain_is_numbered_behind_it() -> None:
    # The sequence was recomputed: 8, 9 and 10 go through the target again, the tree hangs below 10.
    deciding = Deciding()
    sequence = deciding.sequence
    sequence.num_committed = 0
    event = settled(deciding, 12, 99, 99, 22, chain_length=3)
    assert event.tokens == (12, 22)
    assert sequence.pending_accepted == (0, 1, 2, 5)
    assert sequence.num_committed == 4


def test_a_prompt_chunk_commits_its_rows_and_says_nothing() -> None:
    deciding = Deciding()
    sequence = deciding.sequence
    sequence.num_committed = 0
    event = settled(deciding, chain_length=2)
    assert (event.tokens, event.finish_reason) == ((), "")
    assert sequence.pending_accepted == (0, 1)
    assert sequence.num_committed == 2
    assert event.stats.num_rounds == 0


@pytest.mark.parametrize(
    ("stop_token", "emitted", "origins"),
    [
        (11, (11,), (D,)),
        (13, (11, 13), (D, D)),
        (20, (11, 13, 20), (D, D, T)),
    ],
)
def test_the_text_ends_with_a_stop_token(
    stop_token: int, emitted: tuple[int, ...], origins: tuple[Origin, ...]
) -> None:
    event = settled(Deciding(SamplingParams(stop_token_ids=(7, stop_token))), 11, 13, 20, 99)
    assert (event.tokens, event.origins, event.finish_reason) == (emitted, origins, "stop")


@pytest.mark.parametrize(
    ("max_tokens", "emitted", "reason"),
    [(1, (11,), "length"), (2, (11, 13), "length"), (3, (11, 13, 20), "length"), (4, (11, 13, 20), "")],
)
def test_the_text_ends_at_its_length(max_tokens: int, emitted: tuple[int, ...], reason: str) -> None:
    event = settled(Deciding(SamplingParams(max_tokens=max_tokens)), 11, 13, 20, 99)
    assert (event.tokens, event.finish_reason) == (emitted, reason)


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    sampling = SamplingParams(max_tokens=3, stop_token_ids=(20,))
    assert settled(Deciding(sampling), 11, 13, 20, 99).finish_reason == "stop"


def test_a_stop_token_beyond_the_length_does_not_count() -> None:
    sampling = SamplingParams(max_tokens=2, stop_token_ids=(20,))
    assert settled(Deciding(sampling), 11, 13, 20, 99).finish_reason == "length"


def test_a_stop_token_of_the_prompt_does_not_count() -> None:
    assert settled(Deciding(SamplingParams(stop_token_ids=(8,))), 5, 0, 0, 0).tokens == (5,)


def test_a_cancelled_sequence_gets_no_more_tokens() -> None:
    deciding = Deciding()
    sequence = deciding.sequence
    sequence.cancelled = True
    event = settled(deciding, 11, 13, 20, 99)
    assert (event.tokens, event.finish_reason) == ((), "cancelled")
    assert sequence.tokens == [8, 9, 10]


ASKING = SamplingParams(logprobs=True, top_logprobs=2)


def with_logprobs(scores: Scores, *logprobs: float) -> Scores:
    """Each token is its row's likeliest, and token 1 the next."""
    top = np.array([[logprob, 10 * logprob] for logprob in logprobs])
    ids = np.array([[token, 1] for token in scores.tokens.tolist()])[: len(top)]
    return scores._replace(logprobs=np.array(logprobs), top_ids=ids, top_logprobs=top)


def said(token: int, logprob: float) -> TokenLogprobs:
    return TokenLogprobs(logprob, ((token, logprob), (1, 10 * logprob)))


def test_log_probabilities_belong_to_the_tokens_that_came_out() -> None:
    # Token i was sampled after node i of the path: 12 after the root, 22 after node 3.
    scores = with_logprobs(scores_of(1, (12, 99, 98, 22)), -0.1, -0.2, -0.3, -0.4)
    (event,) = Deciding(ASKING).settle(scores)
    assert event.tokens == (12, 22)
    assert event.logprobs == (said(12, -0.1), said(22, -0.4))
    (event,) = Deciding(replace(ASKING, stop_token_ids=(12,))).settle(scores)
    assert event.tokens == (12,)
    assert event.logprobs == (said(12, -0.1),)
    (event,) = Deciding(replace(ASKING, top_logprobs=0)).settle(scores)
    assert event.logprobs == (TokenLogprobs(-0.1, ()), TokenLogprobs(-0.4, ()))


def test_each_step_of_a_round_gets_its_own() -> None:
    """A sequence that does not ask, one that was cancelled, one in its prompt, and one that asks."""
    deciding = Deciding(SamplingParams(), ASKING, SamplingParams(), ASKING)
    plain, cancelled, reading, asking = deciding.sequences
    cancelled.cancelled = True
    reading.num_committed = 0
    scores = scores_of(1, (11, 21, 99, 99, 12, 99, 99, 22, 11, 13, 20, 99))
    scores = with_logprobs(scores, -1.0, -2.0, -3.0, -4.0, -0.1, -0.2, -0.3, -0.4)._replace(
        top_ids=np.array([[12, 1], [99, 1], [99, 1], [22, 1], [11, 1], [13, 1], [20, 1], [99, 1]]),
    )
    events = deciding.settle(scores, [1, 1, 2, 1])
    assert [event.tokens for event in events] == [(11, 21), (), (), (11, 13, 20)]
    assert [event.finish_reason for event in events] == ["", "cancelled", "", ""]
    assert events[3].logprobs == (said(11, -0.1), said(13, -0.2), said(20, -0.3))
    assert [s.pending_accepted for s in (plain, reading, asking)] == [(0, 1), (0, 1), (0, 1, 2)]
    (verified,) = deciding.method.verified
    assert [step.index for step in verified.steps] == [0, 2, 3]
    assert [step.committed.tolist() for step in verified.steps] == [[0, 1], [0, 1], [0, 1, 2]]
    assert [step.num_known for step in verified.steps] == [2, 0, 2]


def test_steps_under_different_rules_share_a_round() -> None:
    # Below 11 the target wants 21, but 13 is the second token of its path.
    deciding = Deciding(ASKING, SamplingParams(), ASKING)
    scores = with_logprobs(scores_of(1, (11, 21, 30, 99) * 3), -0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8)
    children = np.array([-7.0, -8.0, -9.0])  # of 11, 13 and 12 in the third step
    scores = scores._replace(
        child_logprobs=children, child_laws=children, is_pushed_down=np.zeros(3, dtype=bool)
    )
    exact, plain, kept = deciding.settle(scores, rules=[EXACT, EXACT, EverySecond()])
    assert (exact.tokens, exact.origins) == (plain.tokens, plain.origins) == ((11, 21), (D, T))
    assert (kept.tokens, kept.origins) == ((11, 13, 30), (D, K, T))
    assert [entry.logprob for entry in exact.logprobs] == [-0.1, -0.2]
    assert [entry.logprob for entry in kept.logprobs] == [-0.5, -8.0, -0.7]
    assert (kept.stats.num_accepted, kept.stats.num_kept) == (2, 1)
    assert (exact.stats.num_accepted, exact.stats.num_kept) == (1, 0)
    # The target sampled 21 with -0.6, and 13 took its place.
    assert kept.stats.kept.summary() == pytest.approx(
        {"num": 1, "mean_logprob_gap": 7.4, "worst_logprob_gap": 7.4, "mean_score": 0.0, "least_score": 0.0}
    )


@pytest.mark.parametrize(("stop_token", "tokens", "num_kept"), [(13, (11, 13), 1), (11, (11,), 0)])
def test_a_kept_token_may_end_the_text_and_one_behind_its_end_is_not_counted(
    stop_token: int, tokens: tuple[int, ...], num_kept: int
) -> None:
    deciding = Deciding(SamplingParams(stop_token_ids=(stop_token,)))
    children = np.array([-7.0, -8.0, -9.0])
    scores = with_logprobs(scores_of(1, (11, 21, 30, 99)), -0.1, -0.2, -0.3, -0.4)._replace(
        child_logprobs=children,
        child_laws=children,
        is_pushed_down=np.zeros(3, dtype=bool),
    )
    (event,) = deciding.settle(scores, rules=[EverySecond()])
    assert (event.tokens, event.finish_reason) == (tokens, "stop")
    assert event.logprobs == ()  # the account needs them, the request did not ask
    assert event.stats.num_kept == num_kept
    assert deciding.sequence.pending_accepted == (0, 1, 2)[: len(tokens) + 1]


def test_a_law_that_is_none_ends_the_text_behind_what_was_accepted() -> None:
    deciding = Deciding()
    failed = scores_of(1, (11, 0, 99, 99))._replace(failed=np.array([False, True, False, False]))
    (event,) = deciding.settle(failed)
    assert (event.tokens, event.origins, event.finish_reason) == ((11,), (D,), "error")
    assert "after token 3" in event.error


def test_rows_behind_the_last_token_are_not_committed() -> None:
    deciding = Deciding(SamplingParams(stop_token_ids=(11,)))
    assert settled(deciding, 11, 13, 20, 99).tokens == (11,)
    assert deciding.sequence.pending_accepted == (0, 1)
    assert deciding.sequence.num_committed == len(deciding.sequence.tokens) == 4


def test_statistics_count_depths_that_were_offered_below_accepted_tokens() -> None:
    deciding = Deciding()
    stats = settled(deciding, 11, 21, 99, 99).stats
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted) == (1, 3, 1)
    # 11 accepted at depth 1, where 12 was offered, too: one round, not two. 13 offered, not accepted.
    assert (stats.depth_drafted, stats.depth_accepted) == ((1, 1), (1, 0))

    for parent, token in ((0, 11), (1, 13), (0, 12)):
        deciding.grow(parent, token)
    stats = settled(deciding, 30, 99, 99, 99).stats
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted) == (2, 6, 1)
    # 11 was refused, so nobody knows about 13: depth 2 was not offered in this round.
    assert (stats.depth_drafted, stats.depth_accepted) == ((2, 1), (1, 0))

    stats = settled(deciding, 31, num_nodes=1).stats
    assert (stats.num_rounds, stats.num_drafted, stats.depth_drafted) == (3, 6, (2, 1))


def test_what_survives_in_the_tree_hangs_below_the_last_token() -> None:
    deciding = Deciding()
    deciding.grow(2, 20)  # while the target worked: 11 13 20
    deciding.grow(4, 21)
    settled(deciding, 11, 13, 20, 99)
    assert deciding.tree() == [(0, 20), (1, 21)]
    assert deciding.drafting.trees.root_positions[0] == 5


def test_a_sequence_that_ends_teaches_nothing_any_more() -> None:
    deciding = Deciding(SamplingParams(max_tokens=1))
    settled(deciding, 11, 13, 20, 99)
    sources = np.array([deciding.method.source])
    assert deciding.drafting.estimator.estimate(sources, np.array([0.5])) == 0.5
