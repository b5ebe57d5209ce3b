"""What goes into a message comes out of it, bit for bit, and the fullest possible round fits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.workers.link.messages import (
    MAX_STARTS_PER_ROUND,
    Draft,
    MessageCapacity,
    Scores,
    SequenceStart,
    SequenceStep,
    StepScores,
    decode_draft,
    decode_scores,
    encode_draft,
    encode_scores,
)
from outrider.workers.sequences.params import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

BUFFER_INTS = 1 << 14
INT32 = st.integers(0, 2**31 - 1)
NUMBERS = st.floats(allow_nan=False)  # 64 bits, infinities and -0.0 among them
LOG_PROBS = st.floats(width=32, allow_nan=False)

SAMPLING = st.builds(
    SamplingParams,
    temperature=NUMBERS,
    top_k=INT32,
    top_p=NUMBERS,
    min_p=NUMBERS,
    repetition_penalty=NUMBERS,
    presence_penalty=NUMBERS,
    frequency_penalty=NUMBERS,
    logit_bias=st.lists(st.tuples(INT32, NUMBERS), max_size=5).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.booleans(),
    top_logprobs=st.integers(0, MAX_TOP_LOGPROBS),
)
STARTS = st.builds(SequenceStart, slot=INT32, prompt_length=INT32, num_shared_tokens=INT32, sampling=SAMPLING)


@st.composite
def steps(draw: st.DrawFn) -> SequenceStep:
    num_nodes = draw(st.integers(1, 12))
    return SequenceStep(
        slot=draw(INT32),
        accepted=tuple(draw(st.lists(INT32, max_size=9))),
        new_pages=tuple(draw(st.lists(INT32, max_size=9))),
        tokens=tuple(draw(st.lists(INT32, min_size=num_nodes, max_size=num_nodes))),
        parents=(0, *(draw(st.integers(0, node - 1)) for node in range(1, num_nodes))),
        first_sampled=draw(st.integers(0, num_nodes)),
    )


@st.composite
def step_scores(draw: st.DrawFn) -> StepScores:
    num_sampled = draw(st.integers(0, 6))
    wants_logprobs = num_sampled > 0 and draw(st.booleans())
    num_top = draw(st.integers(0, 4)) if wants_logprobs else 0

    def per_row(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, ...]]:
        return st.lists(values, min_size=num_sampled, max_size=num_sampled).map(tuple)

    def top(values: st.SearchStrategy[float]) -> tuple[tuple[float, ...], ...]:
        row = st.lists(values, min_size=num_top, max_size=num_top).map(tuple)
        return draw(per_row(row)) if num_top else ()

    return StepScores(
        tokens=draw(per_row(INT32)),
        logprobs=draw(per_row(LOG_PROBS)) if wants_logprobs else (),
        top_ids=top(INT32),
        top_logprobs=top(LOG_PROBS),
    )


def sent_draft(draft: Draft) -> Draft:
    buffer = torch.full((BUFFER_INTS,), -7, dtype=torch.int32)  # rests of an earlier message
    encode_draft(draft, buffer)
    return decode_draft(buffer.clone())


def sent_scores(scores: Scores) -> Scores:
    buffer = torch.full((BUFFER_INTS,), -7, dtype=torch.int32)
    encode_scores(scores, buffer)
    return decode_scores(buffer.clone())


@given(
    st.builds(
        Draft,
        round_id=INT32,
        starts=st.lists(STARTS, max_size=MAX_STARTS_PER_ROUND).map(tuple),
        released_slots=st.lists(INT32, max_size=4).map(tuple),
        steps=st.lists(steps(), max_size=4).map(tuple),
        stop=st.booleans(),
    )
)
def test_a_draft_arrives_as_it_was_sent(draft: Draft) -> None:
    assert repr(sent_draft(draft)) == repr(draft)  # repr tells -0.0 from 0.0


@given(
    st.builds(
        Scores,
        round_id=INT32,
        steps=st.lists(step_scores(), max_size=4).map(tuple),
        commit_s=LOG_PROBS,
        forward_s=LOG_PROBS,
        sample_s=LOG_PROBS,
    )
)
def test_scores_arrive_as_they_were_sent(scores: Scores) -> None:
    assert repr(sent_scores(scores)) == repr(scores)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_a_seed_keeps_its_64_bits(seed: int) -> None:
    start = SequenceStart(0, 1, 0, SamplingParams(seed=seed))
    (arrived,) = sent_draft(Draft(1, (start,), (), ())).starts
    assert arrived.sampling.seed == seed


def test_sampling_numbers_keep_all_their_bits() -> None:
    # Both sides compute the law; 0.1 as a float32 would be another temperature.
    sampling = SamplingParams(temperature=0.1, top_p=1 / 3, logit_bias=((5, math.nextafter(2.0, 3.0)),))
    (arrived,) = sent_draft(Draft(1, (SequenceStart(0, 1, 0, sampling),), (), ())).starts
    assert arrived.sampling == sampling


def test_log_probabilities_keep_their_float32_bits() -> None:
    values = tuple(np.array([-0.1, -1e-38, -np.inf], dtype=np.float32).tolist())
    step = StepScores((1, 2, 3), values, ((4,), (5,), (6,)), tuple((value,) for value in values))
    assert sent_scores(Scores(1, (step,), 0.0, 0.5, 0.25)).steps == (step,)


def test_only_what_the_target_computes_with_travels() -> None:
    # Lengths and stop conditions are judged by the DraftWorker.
    sampling = SamplingParams(max_tokens=3, stop_token_ids=(7,), stop=("end",), ignore_eos=True)
    (arrived,) = sent_draft(Draft(1, (SequenceStart(0, 1, 0, sampling),), (), ())).starts
    assert arrived.sampling == SamplingParams()


def test_an_empty_round_is_a_message() -> None:
    heartbeat = Draft(3, (), (), ())
    assert sent_draft(heartbeat) == heartbeat
    assert sent_scores(Scores(3, (), 0.0, 0.0, 0.0)) == Scores(3, (), 0.0, 0.0, 0.0)


def test_a_prompt_chunk_is_scored_with_nothing() -> None:
    chunk = SequenceStep(2, (), (8,), (10, 11, 12), (0, 0, 1), first_sampled=3)
    assert sent_draft(Draft(1, (), (), (chunk,))).steps == (chunk,)
    nothing = StepScores((), (), (), ())
    speculating = StepScores((5, 6), (-0.5, -1.0), ((5, 9), (6, 1)), ((-0.5, -2.0), (-1.0, -3.0)))
    assert sent_scores(Scores(1, (nothing, speculating, nothing), 0.0, 0.0, 0.0)).steps == (
        nothing,
        speculating,
        nothing,
    )


ROUND_TOKENS, SEQUENCES, PAGES_PER_SEQUENCE = 64, 8, 20


def fullest_draft(page_size: int) -> Draft:
    """All slots busy, four starts with all that a request may carry, two lanes' accepted nodes."""
    bias = tuple((token, 0.1) for token in range(MAX_LOGIT_BIAS))
    starts = tuple(
        SequenceStart(slot, 1000, 1000, SamplingParams(logit_bias=bias, seed=2**64 - 1))
        for slot in range(MAX_STARTS_PER_ROUND)
    )
    num_nodes = ROUND_TOKENS // SEQUENCES
    round_steps = []
    for slot in range(SEQUENCES):
        starting = slot < MAX_STARTS_PER_ROUND
        num_pages = PAGES_PER_SEQUENCE if starting else num_nodes // page_size
        accepted = () if starting else tuple(range(2 * ROUND_TOKENS // (SEQUENCES - MAX_STARTS_PER_ROUND)))
        pages = tuple(range(num_pages))
        tokens = tuple(range(num_nodes))
        round_steps.append(SequenceStep(slot, accepted, pages, tokens, (0, *range(num_nodes - 1)), 0))
    return Draft(2**31 - 1, starts, tuple(range(SEQUENCES)), tuple(round_steps))


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_fullest_round_fits(page_size: int) -> None:
    capacity = MessageCapacity.for_limits(ROUND_TOKENS, SEQUENCES, PAGES_PER_SEQUENCE)
    buffer = torch.zeros(capacity.draft_ints, dtype=torch.int32)
    draft = fullest_draft(page_size)
    encode_draft(draft, buffer)
    assert decode_draft(buffer) == draft


def test_the_fullest_scores_fit() -> None:
    capacity = MessageCapacity.for_limits(ROUND_TOKENS, SEQUENCES, PAGES_PER_SEQUENCE)
    num_nodes = ROUND_TOKENS // SEQUENCES
    step = StepScores(
        tokens=tuple(range(num_nodes)),
        logprobs=(-0.5,) * num_nodes,
        top_ids=(tuple(range(MAX_TOP_LOGPROBS)),) * num_nodes,
        top_logprobs=((-0.25,) * MAX_TOP_LOGPROBS,) * num_nodes,
    )
    scores = Scores(2**31 - 1, (step,) * SEQUENCES, 0.5, 0.25, 0.125)
    buffer = torch.zeros(capacity.scores_ints, dtype=torch.int32)
    encode_scores(scores, buffer)
    assert decode_scores(buffer) == scores


def test_a_message_that_does_not_fit_is_our_own_mistake() -> None:
    step = SequenceStep(0, (), (), tuple(range(50)), (0, *range(49)), 0)
    with pytest.raises(AssertionError, match="does not fit into 100"):
        encode_draft(Draft(1, (), (), (step,)), torch.zeros(100, dtype=torch.int32))
