"""What goes into a message comes out of it, bit for bit, and a message is as long as what it says."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.workers.link.link import DraftReceiver, DraftSender
from outrider.workers.link.messages import (
    Draft,
    Scores,
    SequenceStep,
    Steps,
    decode_draft,
    encode_draft,
    encode_scores,
)
from outrider.workers.link.starts import ScoreNeeds, SequenceStart
from outrider.workers.sequences.grammar import THOUGHTS, Grammar
from outrider.workers.sequences.params import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams
from support.local_engine import queue_links
from support.steps import scores_of, steps_in

INT32 = st.integers(0, 2**31 - 1)
INT64 = st.integers(0, 2**63 - 1)
NUMBERS = st.floats(allow_nan=False)  # 64 bits, infinities and -0.0 among them
TIMES = st.floats(0.0, 1e6, width=32)

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
    grammar=st.builds(Grammar, st.text(max_size=9), st.sampled_from(THOUGHTS)),
)
# Tokens that end a text travel where there is a least length.
SAMPLING = SAMPLING.flatmap(
    lambda sampling: (
        st.builds(
            replace,
            st.just(sampling),
            min_tokens=st.integers(1, 2**31 - 1),
            stop_token_ids=st.lists(INT32, max_size=4).map(tuple),
        )
        | st.just(sampling)
    )
)
STARTS = st.builds(
    SequenceStart,
    slot=INT32,
    prompt_length=INT32,
    num_shared_tokens=INT32,
    sampling=SAMPLING,
    needs=st.builds(ScoreNeeds, st.booleans(), st.booleans()),
)


@st.composite
def sequence_steps(draw: st.DrawFn) -> SequenceStep:
    num_nodes = draw(st.integers(1, 12))
    return SequenceStep(
        slot=draw(INT32),
        accepted=tuple(draw(st.lists(INT32, max_size=9))),
        new_pages=tuple(draw(st.lists(INT32, max_size=9))),
        tokens=tuple(draw(st.lists(INT32, min_size=num_nodes, max_size=num_nodes))),
        parents=(0, *(draw(st.integers(0, node - 1)) for node in range(1, num_nodes))),
        first_sampled=draw(st.integers(0, num_nodes)),
        first_hidden=draw(st.integers(0, num_nodes)),
    )


@st.composite
def any_scores(draw: st.DrawFn) -> Scores:
    num_sampled, num_top = draw(st.integers(0, 6)), draw(st.integers(0, 4))
    num_asked, num_children, num_entropies = (draw(st.integers(0, num_sampled)) for _ in range(3))
    num_layers, num_hidden = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))

    def floats(*shape: int) -> np.ndarray:
        values = random.standard_normal(shape, dtype=np.float32)
        return np.where(random.random(shape) < 0.1, np.float32(-np.inf), values)

    has_hidden = num_layers > 0 and num_hidden > 0
    return Scores(
        round_id=draw(INT64),
        tokens=random.integers(0, 2**31, num_sampled),
        failed=random.random(num_sampled) < 0.3,
        logprobs=floats(num_asked),
        top_ids=random.integers(0, 2**31, (num_asked, num_top)),
        top_logprobs=floats(num_asked, num_top),
        child_logprobs=floats(num_children),
        child_laws=floats(num_children),
        is_pushed_down=random.random(num_children) < 0.3,
        entropies=floats(num_entropies),
        commit_s=draw(TIMES),
        forward_s=draw(TIMES),
        sample_s=draw(TIMES),
        hidden=torch.randn(num_layers, num_hidden, 5).to(dtype) if has_hidden else None,
    )


def sent_draft(draft: Draft) -> Draft:
    draft_end, target_end = queue_links()
    DraftSender(draft_end).send(draft)
    return decode_draft(DraftReceiver(target_end).receive_message())


def sent_scores(scores: Scores) -> Scores:
    draft_end, target_end = queue_links()
    DraftReceiver(target_end).send(scores)
    return DraftSender(draft_end).receive()


def assert_same(left: object, right: object) -> None:
    """Field by field: arrays with their dtypes and all bits."""
    for name in type(left).__annotations__:
        mine, theirs = getattr(left, name), getattr(right, name)
        if isinstance(theirs, np.ndarray):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
            assert mine.tobytes() == theirs.tobytes(), name
        elif isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        elif isinstance(theirs, Steps):
            assert_same(mine, theirs)
        else:
            assert repr(mine) == repr(theirs), name  # repr tells -0.0 from 0.0


@given(
    st.builds(
        Draft,
        round_id=INT64,
        starts=st.lists(STARTS, max_size=4).map(tuple),
        released_slots=st.lists(INT32, max_size=4).map(tuple),
        steps=st.lists(sequence_steps(), max_size=4).map(Steps.of),
        layers=st.lists(st.integers(0, 3), max_size=3).map(tuple),
        stop=st.booleans(),
    )
)
def test_a_draft_arrives_as_it_was_sent(draft: Draft) -> None:
    assert_same(sent_draft(draft), draft)


@given(st.lists(sequence_steps(), max_size=4))
def test_steps_are_made_of_each_sequence_s_part(parts: list[SequenceStep]) -> None:
    assert steps_in(Steps.of(parts)) == parts


@given(any_scores())
def test_scores_arrive_as_they_were_sent(scores: Scores) -> None:
    assert_same(sent_scores(scores), scores)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_a_seed_keeps_its_64_bits(seed: int) -> None:
    start = SequenceStart(0, 1, 0, SamplingParams(seed=seed))
    (arrived,) = sent_draft(Draft(1, (start,), (), Steps.of([]))).starts
    assert arrived.sampling.seed == seed


def test_a_deployment_may_run_for_months() -> None:
    # At 500 rounds per second the number of a round leaves 31 bits after 50 days.
    assert sent_draft(Draft(2**31, (), (), Steps.of([]))).round_id == 2**31
    assert sent_scores(scores_of(2**31)).round_id == 2**31


def test_sampling_numbers_keep_all_their_bits() -> None:
    # Both sides compute the law; 0.1 as a float32 would be another temperature.
    sampling = SamplingParams(temperature=0.1, top_p=1 / 3, logit_bias=((5, math.nextafter(2.0, 3.0)),))
    (arrived,) = sent_draft(Draft(1, (SequenceStart(0, 1, 0, sampling),), (), Steps.of([]))).starts
    assert arrived.sampling == sampling


def test_only_what_the_target_computes_with_travels() -> None:
    # Lengths and stop conditions are judged by the DraftWorker.
    sampling = SamplingParams(max_tokens=3, stop_token_ids=(7,), stop=("end",), ignore_eos=True)
    (arrived,) = sent_draft(Draft(1, (SequenceStart(0, 1, 0, sampling),), (), Steps.of([]))).starts
    assert arrived.sampling == SamplingParams()


def test_which_nodes_are_sampled_and_whose_hidden_rows_are_wanted() -> None:
    chunk = SequenceStep(4, tokens=(10, 11, 12), parents=(0, 0, 1), first_sampled=3, first_hidden=0)
    tree = SequenceStep(7, tokens=(20, 21, 22, 23), parents=(0, 0, 1, 1), first_sampled=1, first_hidden=2)
    plain = SequenceStep(2, tokens=(30,), parents=(0,))
    steps = Steps.of([chunk, tree, plain])
    assert steps.sampled_rows.tolist() == [4, 5, 6, 7]
    assert steps.hidden_rows.tolist() == [0, 1, 2, 5, 6]
    assert steps.num_sampled.tolist() == [0, 3, 1]
    assert (len(steps), steps.num_rows) == (3, 8)


def test_messages_are_as_long_as_what_they_say() -> None:
    heartbeat = len(encode_draft(Draft(1, (), (), Steps.of([]))))
    assert heartbeat < 32
    tree = SequenceStep(0, (1, 2), (3,), range(33), (0, *range(32)))
    one = len(encode_draft(Draft(1, (), (), Steps.of([tree]))))
    assert one < heartbeat + 2 * 33 + 16
    bias = tuple((token, 0.1) for token in range(MAX_LOGIT_BIAS))
    start = SequenceStart(0, 1000, 1000, SamplingParams(logit_bias=bias))
    assert len(encode_draft(Draft(1, (start,), (), Steps.of([tree])))) < one + 3 * MAX_LOGIT_BIAS + 32
    assert len(encode_scores(scores_of(1, range(33)))) < 33 + 32
