"""What a verdict makes of a sequence. The tree of most examples, nodes numbered as they are sent:

node 0 = 10 ─┬─ 1 = 11 ─── 2 = 13
             └─ 3 = 12
"""

import pytest

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.rounds.scheduler import PlannedStep
from outrider.workers.rounds.settle import StepScores, settle_step
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import Verdict, verify_exact
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence, TokenEvent, TokenLogprobs
from outrider.workers.sequences.tree import DraftTree, GrowingTree

TREE = DraftTree(tokens=(10, 11, 13, 12), parents=(0, 0, 1, 0), growing_nodes=(0, 1, 2, 3))


@pytest.mark.parametrize(
    ("target_tokens", "path", "next_token"),
    [
        ((11, 13, 20, 99), (0, 1, 2), 20),  # both drafts, and a bonus token
        ((11, 21, 99, 99), (0, 1), 21),  # one draft, and the recovered token
        ((12, 99, 99, 22), (0, 3), 22),  # the second branch
        ((23, 13, 99, 99), (0,), 23),  # none: what stands below a rejected token does not count
        ((13, 99, 99, 99), (0,), 13),  # a token of the tree in another place
    ],
)
def test_a_draft_token_is_accepted_iff_it_is_the_targets(
    target_tokens: tuple[int, ...], path: tuple[int, ...], next_token: int
) -> None:
    verdict = verify_exact(TREE, target_tokens)
    assert verdict == Verdict(path, next_token)
    assert verdict.emitted(TREE) == [TREE.tokens[n] for n in path[1:]] + [next_token]


def test_plain_decoding_accepts_nothing_and_emits_one_token() -> None:
    assert verify_exact(DraftTree.root_only(10), (5,)) == Verdict((0,), 5)


def decoding_sequence(sampling: SamplingParams | None = None) -> Sequence:
    """Prompt 8 9 10, of which 8 and 9 are committed; TREE is under verification."""
    tree = GrowingTree(10, 2)
    for parent, token in ((0, 11), (1, 13), (0, 12)):
        tree.add_child(parent, token, 0.5, (1, 0))
    request = Request("a", (8, 9, 10), sampling or SamplingParams(), DraftOptions(("ngram",), 8, 8))
    return Sequence(request, [8, 9, 10], num_committed=2, tree=tree, sent_tree=TREE, sent_chain=1)


def settled(
    sequence: Sequence, scores: StepScores, chain_length: int = 1, drafting: DraftEngine | None = None
) -> TokenEvent:
    return settle_step(PlannedStep(sequence, chain_length), scores, drafting or DraftEngine(NgramConfig()))


def tokens_only(*tokens: int) -> StepScores:
    return StepScores(tokens, (), (), ())


def test_accepted_tokens_join_the_text_and_their_rows_are_kept() -> None:
    sequence = decoding_sequence()
    event = settled(sequence, tokens_only(11, 13, 20, 99))
    assert event.tokens == (11, 13, 20)
    assert event.from_draft == (True, True, False)
    assert (event.finish_reason, event.error, event.logprobs) == ("", "", ())
    assert sequence.tokens == [8, 9, 10, 11, 13, 20]
    assert sequence.pending_accepted == (0, 1, 2)
    assert sequence.num_committed == 5
    assert sequence.num_uncommitted == 1  # the target's own token has no row yet
    assert [node.token for node in sequence.tree.nodes] == [20]


def test_rows_of_a_second_branch_are_named_as_they_were_sent() -> None:
    sequence = decoding_sequence()
    assert settled(sequence, tokens_only(12, 99, 99, 22)).tokens == (12, 22)
    assert sequence.pending_accepted == (0, 3)


def test_a_tree_below_the_end_of_a_chain_is_numbered_behind_it() -> None:
    # The sequence was recomputed: 8, 9 and 10 go through the target again, the tree hangs below 10.
    sequence = decoding_sequence()
    sequence.num_committed = 0
    event = settled(sequence, tokens_only(12, 99, 99, 22), chain_length=3)
    assert event.tokens == (12, 22)
    assert sequence.pending_accepted == (0, 1, 2, 5)
    assert sequence.num_committed == 4


def test_a_prompt_chunk_commits_its_rows_and_says_nothing() -> None:
    sequence = decoding_sequence()
    sequence.num_committed = 0
    event = settled(sequence, tokens_only(), chain_length=2)
    assert (event.tokens, event.finish_reason) == ((), "")
    assert sequence.pending_accepted == (0, 1)
    assert sequence.num_committed == 2
    assert event.stats.num_rounds == 0


@pytest.mark.parametrize(
    ("stop_token", "emitted", "from_draft"),
    [
        (11, (11,), (True,)),
        (13, (11, 13), (True, True)),
        (20, (11, 13, 20), (True, True, False)),
    ],
)
def test_the_text_ends_with_a_stop_token(
    stop_token: int, emitted: tuple[int, ...], from_draft: tuple[bool, ...]
) -> None:
    sequence = decoding_sequence(SamplingParams(stop_token_ids=(7, stop_token)))
    event = settled(sequence, tokens_only(11, 13, 20, 99))
    assert (event.tokens, event.from_draft, event.finish_reason) == (emitted, from_draft, "stop")


@pytest.mark.parametrize(
    ("max_tokens", "emitted", "reason"),
    [(1, (11,), "length"), (2, (11, 13), "length"), (3, (11, 13, 20), "length"), (4, (11, 13, 20), "")],
)
def test_the_text_ends_at_its_length(max_tokens: int, emitted: tuple[int, ...], reason: str) -> None:
    event = settled(decoding_sequence(SamplingParams(max_tokens=max_tokens)), tokens_only(11, 13, 20, 99))
    assert (event.tokens, event.finish_reason) == (emitted, reason)


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    sampling = SamplingParams(max_tokens=3, stop_token_ids=(20,))
    assert settled(decoding_sequence(sampling), tokens_only(11, 13, 20, 99)).finish_reason == "stop"


def test_a_stop_token_beyond_the_length_does_not_count() -> None:
    sampling = SamplingParams(max_tokens=2, stop_token_ids=(20,))
    assert settled(decoding_sequence(sampling), tokens_only(11, 13, 20, 99)).finish_reason == "length"


def test_a_stop_token_of_the_prompt_does_not_count() -> None:
    assert settled(
        decoding_sequence(SamplingParams(stop_token_ids=(8,))), tokens_only(5, 0, 0, 0)
    ).tokens == (5,)


def test_a_cancelled_sequence_gets_no_more_tokens() -> None:
    sequence = decoding_sequence()
    sequence.cancelled = True
    event = settled(sequence, tokens_only(11, 13, 20, 99))
    assert (event.tokens, event.finish_reason) == ((), "cancelled")
    assert sequence.tokens == [8, 9, 10]


SCORES_WITH_LOGPROBS = StepScores(
    tokens=(12, 99, 98, 22),
    logprobs=(-0.1, -0.2, -0.3, -0.4),
    top_ids=((12, 1), (99, 2), (98, 3), (22, 4)),
    top_logprobs=((-0.1, -1.0), (-0.2, -2.0), (-0.3, -3.0), (-0.4, -4.0)),
)


def test_log_probabilities_belong_to_the_tokens_that_came_out() -> None:
    # Token i was sampled after node i of the path: 12 after the root, 22 after node 3.
    event = settled(decoding_sequence(), SCORES_WITH_LOGPROBS)
    assert event.tokens == (12, 22)
    assert event.logprobs == (
        TokenLogprobs(-0.1, ((12, -0.1), (1, -1.0))),
        TokenLogprobs(-0.4, ((22, -0.4), (4, -4.0))),
    )


def test_there_are_as_many_log_probabilities_as_tokens() -> None:
    event = settled(decoding_sequence(SamplingParams(stop_token_ids=(12,))), SCORES_WITH_LOGPROBS)
    assert event.tokens == (12,)
    assert event.logprobs == (TokenLogprobs(-0.1, ((12, -0.1), (1, -1.0))),)


def test_log_probabilities_without_the_likeliest() -> None:
    event = settled(decoding_sequence(), StepScores((5, 0, 0, 0), (-0.5, 0.0, 0.0, 0.0), (), ()))
    assert event.logprobs == (TokenLogprobs(-0.5, ()),)


def test_statistics_count_depths_that_were_offered_below_accepted_tokens() -> None:
    sequence = decoding_sequence()
    stats = settled(sequence, tokens_only(11, 21, 99, 99)).stats
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted) == (1, 3, 1)
    # 11 accepted at depth 1, where 12 was offered, too: one round, not two. 13 offered, not accepted.
    assert (stats.depth_drafted, stats.depth_accepted) == ((1, 1), (1, 0))

    sequence.sent_tree = TREE
    stats = settled(sequence, tokens_only(30, 99, 99, 99)).stats
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted) == (2, 6, 1)
    # 11 was refused, so nobody knows about 13: depth 2 was not offered in this round.
    assert (stats.depth_drafted, stats.depth_accepted) == ((2, 1), (1, 0))

    sequence.sent_tree = DraftTree.root_only(30)
    stats = settled(sequence, tokens_only(31)).stats
    assert (stats.num_rounds, stats.num_drafted, stats.depth_drafted) == (3, 6, (2, 1))


def test_what_survives_in_the_tree_hangs_below_the_last_token() -> None:
    sequence = decoding_sequence()
    sequence.tree.add_child(2, 20, 0.5, (1, 0))  # grown while the target worked: 11 13 20
    sequence.tree.add_child(4, 21, 0.5, (1, 0))
    settled(sequence, tokens_only(11, 13, 20, 99))
    assert [(n.token, n.position) for n in sequence.tree.nodes] == [(20, 5), (21, 6)]


def test_a_sequence_that_ends_teaches_nothing_any_more() -> None:
    drafting = DraftEngine(NgramConfig())
    settled(decoding_sequence(SamplingParams(max_tokens=1)), tokens_only(11, 13, 20, 99), drafting=drafting)
    assert drafting.estimator.estimate((1, 0), 0.5) == 0.5
