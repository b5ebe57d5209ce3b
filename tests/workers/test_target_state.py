"""What a rank keeps of its slots, on pages of four rows. Cache slot = page * 4 + offset.

The example of most tests: slot 2 of the rank gets pages 5 and 1, so its rows 0-3 are cache slots 20-23 and
its rows 4-7 are cache slots 4-7.
"""

import pytest
import torch

from outrider.workers.link.messages import Draft, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.model.batch import build_batch
from outrider.workers.sampling.context import SampledRows
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.target_state import TargetSequences

PENALISED = SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.5)


def started(sampling: SamplingParams | None = None, prompt_length: int = 3) -> TargetSequences:
    """Slot 2 with the prompt 10 11 12 and a tree below it under way: 12 -> (13 -> 15, 14)."""
    sequences = TargetSequences(num_slots=5, num_pages=8, page_size=4)
    first = step((10, 11, 12, 13, 15, 14), (0, 0, 1, 2, 3, 2), first_sampled=2, new_pages=(5, 1))
    apply(sequences, (first,), starts=(SequenceStart(2, prompt_length, 0, sampling or SamplingParams()),))
    compute(sequences, first)
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
    sources, targets = sequences.apply(Draft(1, starts, released, Steps.of(steps)))
    assert (sources.dtype, targets.dtype) == (torch.int64, torch.int64)
    return list(zip(sources.tolist(), targets.tolist(), strict=True))


def compute(sequences: TargetSequences, *steps: SequenceStep) -> list[int]:
    """The cache slots in which the steps' rows are written."""
    rows = sequences.rows(Steps.of(steps))
    slots: list[int] = build_batch(sequences.tables, rows, torch.device("cpu")).kv_rows.tolist()
    return slots


def sampled(sequences: TargetSequences, *steps: SequenceStep) -> list[SampledRows]:
    all_steps = Steps.of(steps)
    return sequences.sampled(all_steps, sequences.rows(all_steps))


def seen_tokens(sequences: TargetSequences, step: SequenceStep) -> list[dict[int, int]]:
    """For the penalties of each sampled node: token -> times in the output."""
    (rows,) = sampled(sequences, step)
    ids, counts, seen = rows.penalties.along(rows.paths)
    return [
        dict(zip(ids[has].tolist(), row[has].tolist(), strict=True))
        for row, has in zip(counts, seen, strict=True)
    ]


def test_a_path_that_is_in_place_moves_nothing() -> None:
    sequences = started()
    following = step((16,), (0,), accepted=(0, 1, 2, 3, 4))  # 10 11 12 13 15
    assert apply(sequences, (following,)) == []
    assert compute(sequences, following) == [5]


def test_a_path_through_a_later_branch_moves_behind_the_committed_rows() -> None:
    sequences = started()
    following = step((16,), (0,), accepted=(0, 1, 2, 5))  # 10 11 12 14
    # Row 5 (page 1, offset 1 = cache slot 5) becomes row 3 (page 5, offset 3 = cache slot 23).
    assert apply(sequences, (following,)) == [(5, 23)]
    assert compute(sequences, following) == [4]


def test_later_paths_are_relative_to_the_committed_rows() -> None:
    sequences = started()
    second = step((14, 30, 31, 32), (0, 0, 0, 2), accepted=(0, 1, 2))
    assert apply(sequences, (second,)) == []
    assert compute(sequences, second) == [23, 4, 5, 6]
    third = step((40,), (0,), accepted=(0, 2, 3), new_pages=(7,))  # 14 31 32: rows 3, 5, 6 -> 3, 4, 5
    assert apply(sequences, (third,)) == [(5, 4), (6, 5)]
    assert compute(sequences, third) == [6]


def test_moves_of_all_sequences_are_made_at_once() -> None:
    sequences = started()
    other = step((1, 2, 3), (0, 0, 0), new_pages=(3,), slot=0)
    apply(sequences, (other,), starts=(SequenceStart(0, 1, 0, SamplingParams()),))
    compute(sequences, other)
    moves = apply(
        sequences,
        (step((16,), (0,), accepted=(0, 1, 2, 5)), step((9,), (0,), accepted=(0, 2), slot=0)),
    )
    assert moves == [(5, 23), (14, 13)]


def test_a_prompt_in_chunks() -> None:
    sequences = TargetSequences(num_slots=5, num_pages=8, page_size=4)
    chunk = step((10, 11, 12), (0, 0, 1), first_sampled=3, new_pages=(5,))
    apply(sequences, (chunk,), starts=(SequenceStart(2, 5, 0, SamplingParams()),))
    assert compute(sequences, chunk) == [20, 21, 22]
    assert sampled(sequences, chunk) == []
    rest = step((13, 14), (0, 0), first_sampled=1, accepted=(0, 1, 2), new_pages=(1,))
    assert apply(sequences, (rest,)) == []
    assert compute(sequences, rest) == [23, 4]
    assert [rows.positions.tolist() for rows in sampled(sequences, rest)] == [[5]]


def test_rows_of_several_sequences_lie_back_to_back() -> None:
    sequences = started()
    other = step((1, 2, 3), (0, 0, 0), new_pages=(3,), slot=0)
    following = step((14, 30, 31), (0, 0, 1), accepted=(0, 1, 2))
    apply(sequences, (other, following), starts=(SequenceStart(0, 1, 0, SamplingParams()),))
    rows = sequences.rows(Steps.of([other, following]))
    assert rows.slots.tolist() == [0, 2]
    assert rows.context_lens.tolist() == [0, 3]
    assert rows.tree_lens.tolist() == rows.query_lens.tolist() == [3, 3]
    assert rows.tokens.tolist() == [1, 2, 3, 14, 30, 31]
    assert rows.tree_rows.tolist() == [0, 1, 2, 0, 1, 2]
    assert rows.depths.tolist() == [0, 1, 1, 0, 1, 2]
    assert rows.ancestors.tolist() == [[0b1], [0b11], [0b101], [0b1], [0b11], [0b111]]
    assert compute(sequences, other, following) == [12, 13, 14, 23, 4, 5]


def test_positions_follow_the_depth() -> None:
    sequences = started()
    second = step((14, 30, 31, 32), (0, 0, 0, 2), accepted=(0, 1, 2))
    apply(sequences, (second,))
    compute(sequences, second)
    # 14 is token 3 of the sequence; after it comes token 4, after 30 and 31 token 5, after 32 token 6.
    (rows,) = sampled(sequences, second)
    assert rows.positions.tolist() == [4, 5, 5, 6]
    assert rows.paths == ()  # nothing asked for it


def test_penalties_know_the_prompt_the_output_and_the_path() -> None:
    sequences = started(PENALISED)
    first = step((10, 11, 12, 13, 15, 14), (0, 0, 1, 2, 3, 2), first_sampled=2)
    assert seen_tokens(sequences, first) == [  # after 12, 13, 15 and 14
        {10: 0, 11: 0, 12: 0},
        {10: 0, 11: 0, 12: 0, 13: 1},
        {10: 0, 11: 0, 12: 0, 13: 1, 15: 1},
        {10: 0, 11: 0, 12: 0, 14: 1},
    ]
    second = step((14, 14, 10), (0, 0, 1), accepted=(0, 1, 2, 3))  # 13 came out, then 14
    apply(sequences, (second,))
    compute(sequences, second)
    assert seen_tokens(sequences, second) == [
        {10: 0, 11: 0, 12: 0, 13: 1, 14: 1},
        {10: 0, 11: 0, 12: 0, 13: 1, 14: 2},
        {10: 1, 11: 0, 12: 0, 13: 1, 14: 2},
    ]


def test_penalties_of_a_prompt_in_chunks_know_all_of_it() -> None:
    sequences = TargetSequences(num_slots=5, num_pages=8, page_size=4)
    chunk = step((10, 11, 12), (0, 0, 1), first_sampled=3, new_pages=(5, 1))
    apply(sequences, (chunk,), starts=(SequenceStart(2, 5, 0, PENALISED),))
    compute(sequences, chunk)
    assert sampled(sequences, chunk) == []
    rest = step((13, 14, 15), (0, 0, 1), first_sampled=1, accepted=(0, 1, 2))
    apply(sequences, (rest,))
    compute(sequences, rest)
    assert seen_tokens(sequences, rest) == [
        {10: 0, 11: 0, 12: 0, 13: 0, 14: 0},
        {10: 0, 11: 0, 12: 0, 13: 0, 14: 0, 15: 1},
    ]


@pytest.mark.parametrize("prompt_length", [1, 2, 4, 5])
def test_a_recomputed_sequence_counts_its_output_as_output(prompt_length: int) -> None:
    # Five known tokens come back in two chunks; those behind the prompt are output, wherever the chunks end.
    sequences = TargetSequences(num_slots=5, num_pages=8, page_size=4)
    known = (10, 11, 12, 11, 12)
    chunk = step(known[:3], (0, 0, 1), first_sampled=3, new_pages=(5, 1))
    apply(sequences, (chunk,), starts=(SequenceStart(2, prompt_length, 0, PENALISED),))
    compute(sequences, chunk)
    rest = step(known[3:], (0, 0), first_sampled=1, accepted=(0, 1, 2))
    apply(sequences, (rest,))
    compute(sequences, rest)
    (seen,) = seen_tokens(sequences, rest)
    output = known[prompt_length:]
    assert seen == {token: output.count(token) for token in known}
    # The next round commits them: nothing is counted twice.
    following = step((13,), (0,), accepted=(0, 1))
    apply(sequences, (following,))
    compute(sequences, following)
    (seen,) = seen_tokens(sequences, following)
    assert seen == {token: output.count(token) for token in known} | {13: 1}


def test_a_sequence_learns_the_tokens_of_pages_it_shares() -> None:
    sequences = started()
    following = step((15, 16, 17), (0, 0, 1), accepted=(0, 1, 2, 5))  # committed: 10 11 12 14
    apply(sequences, (following,))
    compute(sequences, following)
    newcomer = step((20,), (0,), new_pages=(5, 6), slot=4)
    moves = apply(sequences, (newcomer,), starts=(SequenceStart(4, 5, 4, PENALISED),))
    assert moves == []
    assert compute(sequences, newcomer) == [24]
    (seen,) = seen_tokens(sequences, newcomer)
    # 14, which moved into the shared page when it was accepted, and not 13, which stood there before.
    assert seen == {10: 0, 11: 0, 12: 0, 14: 0, 20: 0}


def test_a_page_is_shared_in_the_message_that_fills_it_last() -> None:
    # The commit of slot 2 and the start of slot 4 come in one message: the commit counts first.
    sequences = started()
    newcomer = step((20,), (0,), new_pages=(5, 6), slot=4)
    apply(
        sequences,
        (newcomer, step((16,), (0,), accepted=(0, 1, 2, 5))),
        starts=(SequenceStart(4, 5, 4, PENALISED),),
    )
    compute(sequences, newcomer)
    (seen,) = seen_tokens(sequences, newcomer)
    assert 14 in seen


def test_a_released_slot_is_filled_anew_in_the_same_message() -> None:
    sequences = started(PENALISED)
    again = step((30, 31), (0, 0), first_sampled=1, new_pages=(3,))
    assert apply(sequences, (again,), starts=(SequenceStart(2, 2, 0, PENALISED),), released=(2,)) == []
    assert compute(sequences, again) == [12, 13]
    (seen,) = seen_tokens(sequences, again)
    assert seen == {30: 0, 31: 0}


def test_a_slot_that_is_taken_cannot_be_started() -> None:
    sequences = started()
    with pytest.raises(AssertionError):
        apply(sequences, (), starts=(SequenceStart(2, 1, 0, SamplingParams()),))


def test_an_empty_message_moves_nothing() -> None:
    assert apply(started(), ()) == []
