"""What a rank keeps of its slots, on pages of four rows. Cache slot = page * 4 + offset.

The example of most tests: slot 2 of the rank gets pages 5 and 1, so its rows 0-3 are cache slots 20-23 and
its rows 4-7 are cache slots 4-7.
"""

import pytest
import torch

from outrider.workers.link.messages import Draft, SequenceStart, SequenceStep
from outrider.workers.model.batch import SequenceRows
from outrider.workers.sampling.context import RowContext
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.target_state import TargetSequences

PENALISED = SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.5)


def started(sampling: SamplingParams | None = None, prompt_length: int = 3) -> TargetSequences:
    """Slot 2 with the prompt 10 11 12 and a tree below it under way: 12 -> (13 -> 15, 14)."""
    sequences = TargetSequences(num_pages=8, page_size=4)
    first = step((10, 11, 12, 13, 15, 14), (0, 0, 1, 2, 3, 2), first_sampled=2, new_pages=(5, 1))
    apply(sequences, (first,), starts=(SequenceStart(2, prompt_length, 0, sampling or SamplingParams()),))
    sequences.rows(first)
    return sequences


def step(
    tokens: tuple[int, ...],
    parents: tuple[int, ...],
    first_sampled: int = 0,
    accepted: tuple[int, ...] = (),
    new_pages: tuple[int, ...] = (),
    slot: int = 2,
) -> SequenceStep:
    return SequenceStep(slot, accepted, new_pages, tokens, parents, first_sampled)


def apply(
    sequences: TargetSequences,
    steps: tuple[SequenceStep, ...],
    starts: tuple[SequenceStart, ...] = (),
    released: tuple[int, ...] = (),
) -> list[tuple[int, int]]:
    """The moves, as (from, to) cache slots."""
    sources, targets = sequences.apply(Draft(1, starts, released, steps))
    assert (sources.dtype, targets.dtype) == (torch.int64, torch.int64)
    return list(zip(sources.tolist(), targets.tolist(), strict=True))


def seen_tokens(context: RowContext) -> dict[int, int]:
    """Token -> times in the output, for the penalties of a row."""
    ids, counts = context.penalties.with_path(context.path_tokens)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def test_a_path_that_is_in_place_moves_nothing() -> None:
    sequences = started()
    following = step((16,), (0,), accepted=(0, 1, 2, 3, 4))  # 10 11 12 13 15
    assert apply(sequences, (following,)) == []
    assert sequences.rows(following) == SequenceRows([5, 1], 5, (0,), 0, (16,))


def test_a_path_through_a_later_branch_moves_behind_the_committed_rows() -> None:
    sequences = started()
    following = step((16,), (0,), accepted=(0, 1, 2, 5))  # 10 11 12 14
    # Row 5 (page 1, offset 1 = cache slot 5) becomes row 3 (page 5, offset 3 = cache slot 23).
    assert apply(sequences, (following,)) == [(5, 23)]
    assert sequences.rows(following).context_len == 4


def test_later_paths_are_relative_to_the_committed_rows() -> None:
    sequences = started()
    second = step((14, 30, 31, 32), (0, 0, 0, 2), accepted=(0, 1, 2))
    assert apply(sequences, (second,)) == []
    assert sequences.rows(second) == SequenceRows([5, 1], 3, (0, 0, 0, 2), 0, (14, 30, 31, 32))
    third = step((40,), (0,), accepted=(0, 2, 3), new_pages=(7,))  # 14 31 32: rows 3, 5, 6 -> 3, 4, 5
    assert apply(sequences, (third,)) == [(5, 4), (6, 5)]
    assert sequences.rows(third) == SequenceRows([5, 1, 7], 6, (0,), 0, (40,))


def test_moves_of_all_sequences_are_made_at_once() -> None:
    sequences = started()
    other = step((1, 2, 3), (0, 0, 0), new_pages=(3,), slot=0)
    apply(sequences, (other,), starts=(SequenceStart(0, 1, 0, SamplingParams()),))
    sequences.rows(other)
    moves = apply(
        sequences,
        (step((16,), (0,), accepted=(0, 1, 2, 5)), step((9,), (0,), accepted=(0, 2), slot=0)),
    )
    assert moves == [(5, 23), (14, 13)]


def test_a_prompt_in_chunks() -> None:
    sequences = TargetSequences(num_pages=8, page_size=4)
    chunk = step((10, 11, 12), (0, 0, 1), first_sampled=3, new_pages=(5,))
    apply(sequences, (chunk,), starts=(SequenceStart(2, 5, 0, SamplingParams()),))
    assert sequences.rows(chunk) == SequenceRows([5], 0, (0, 0, 1), 0, (10, 11, 12))
    assert sequences.contexts(chunk) == []
    rest = step((13, 14), (0, 0), first_sampled=1, accepted=(0, 1, 2), new_pages=(1,))
    assert apply(sequences, (rest,)) == []
    assert sequences.rows(rest) == SequenceRows([5, 1], 3, (0, 0), 0, (13, 14))
    (context,) = sequences.contexts(rest)
    assert context.position == 5


def test_positions_follow_the_depth() -> None:
    sequences = started()
    second = step((14, 30, 31, 32), (0, 0, 0, 2), accepted=(0, 1, 2))
    apply(sequences, (second,))
    sequences.rows(second)
    # 14 is token 3 of the sequence; after it comes token 4, after 30 and 31 token 5, after 32 token 6.
    assert [context.position for context in sequences.contexts(second)] == [4, 5, 5, 6]
    assert all(context.path_tokens == () for context in sequences.contexts(second))  # nothing asked for it


def test_penalties_know_the_prompt_the_output_and_the_path() -> None:
    sequences = started(PENALISED)
    first = step((10, 11, 12, 13, 15, 14), (0, 0, 1, 2, 3, 2), first_sampled=2)
    contexts = sequences.contexts(first)  # after 12, 13, 15 and 14
    assert [seen_tokens(context) for context in contexts] == [
        {10: 0, 11: 0, 12: 0},
        {10: 0, 11: 0, 12: 0, 13: 1},
        {10: 0, 11: 0, 12: 0, 13: 1, 15: 1},
        {10: 0, 11: 0, 12: 0, 14: 1},
    ]
    second = step((14, 14, 10), (0, 0, 1), accepted=(0, 1, 2, 3))  # 13 came out, then 14
    apply(sequences, (second,))
    sequences.rows(second)
    assert [seen_tokens(context) for context in sequences.contexts(second)] == [
        {10: 0, 11: 0, 12: 0, 13: 1, 14: 1},
        {10: 0, 11: 0, 12: 0, 13: 1, 14: 2},
        {10: 1, 11: 0, 12: 0, 13: 1, 14: 2},
    ]


def test_penalties_of_a_prompt_in_chunks_know_all_of_it() -> None:
    sequences = TargetSequences(num_pages=8, page_size=4)
    chunk = step((10, 11, 12), (0, 0, 1), first_sampled=3, new_pages=(5, 1))
    apply(sequences, (chunk,), starts=(SequenceStart(2, 5, 0, PENALISED),))
    sequences.rows(chunk)
    assert sequences.contexts(chunk) == []
    rest = step((13, 14, 15), (0, 0, 1), first_sampled=1, accepted=(0, 1, 2))
    apply(sequences, (rest,))
    sequences.rows(rest)
    assert [seen_tokens(context) for context in sequences.contexts(rest)] == [
        {10: 0, 11: 0, 12: 0, 13: 0, 14: 0},
        {10: 0, 11: 0, 12: 0, 13: 0, 14: 0, 15: 1},
    ]


@pytest.mark.parametrize("prompt_length", [1, 2, 4, 5])
def test_a_recomputed_sequence_counts_its_output_as_output(prompt_length: int) -> None:
    # Five known tokens come back in two chunks; those behind the prompt are output, wherever the chunks end.
    sequences = TargetSequences(num_pages=8, page_size=4)
    known = (10, 11, 12, 11, 12)
    chunk = step(known[:3], (0, 0, 1), first_sampled=3, new_pages=(5, 1))
    apply(sequences, (chunk,), starts=(SequenceStart(2, prompt_length, 0, PENALISED),))
    sequences.rows(chunk)
    rest = step(known[3:], (0, 0), first_sampled=1, accepted=(0, 1, 2))
    apply(sequences, (rest,))
    sequences.rows(rest)
    (context,) = sequences.contexts(rest)
    output = known[prompt_length:]
    assert seen_tokens(context) == {token: output.count(token) for token in known}
    # The next round commits them: nothing is counted twice.
    following = step((13,), (0,), accepted=(0, 1))
    apply(sequences, (following,))
    sequences.rows(following)
    (context,) = sequences.contexts(following)
    assert seen_tokens(context) == {token: output.count(token) for token in known} | {13: 1}


def test_a_sequence_learns_the_tokens_of_pages_it_shares() -> None:
    sequences = started()
    following = step((15, 16, 17), (0, 0, 1), accepted=(0, 1, 2, 5))  # committed: 10 11 12 14
    apply(sequences, (following,))
    sequences.rows(following)
    newcomer = step((20,), (0,), new_pages=(5, 6), slot=4)
    moves = apply(sequences, (newcomer,), starts=(SequenceStart(4, 5, 4, PENALISED),))
    assert moves == []
    assert sequences.rows(newcomer) == SequenceRows([5, 6], 4, (0,), 0, (20,))
    (context,) = sequences.contexts(newcomer)
    # 14, which moved into the shared page when it was accepted, and not 13, which stood there before.
    assert seen_tokens(context) == {10: 0, 11: 0, 12: 0, 14: 0, 20: 0}


def test_a_page_is_shared_in_the_message_that_fills_it_last() -> None:
    # The commit of slot 2 and the start of slot 4 come in one message: the commit counts first.
    sequences = started()
    newcomer = step((20,), (0,), new_pages=(5, 6), slot=4)
    apply(
        sequences,
        (newcomer, step((16,), (0,), accepted=(0, 1, 2, 5))),
        starts=(SequenceStart(4, 5, 4, PENALISED),),
    )
    sequences.rows(newcomer)
    (context,) = sequences.contexts(newcomer)
    assert 14 in seen_tokens(context)


def test_a_released_slot_is_filled_anew_in_the_same_message() -> None:
    sequences = started(PENALISED)
    again = step((30, 31), (0, 0), first_sampled=1, new_pages=(3,))
    assert apply(sequences, (again,), starts=(SequenceStart(2, 2, 0, PENALISED),), released=(2,)) == []
    assert sequences.rows(again) == SequenceRows([3], 0, (0, 0), 0, (30, 31))
    (context,) = sequences.contexts(again)
    assert seen_tokens(context) == {30: 0, 31: 0}


def test_a_slot_that_is_taken_cannot_be_started() -> None:
    sequences = started()
    with pytest.raises(AssertionError):
        apply(sequences, (), starts=(SequenceStart(2, 1, 0, SamplingParams()),))


def test_an_empty_message_moves_nothing() -> None:
    assert apply(started(), ()) == []
