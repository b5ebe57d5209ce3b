import pytest

from outrider.cluster.bench.decoders import AS_CONFIGURED, PLAIN, EngineAnswerer, EngineDecoder
from outrider.cluster.bench.identity import Question
from outrider.workers.sequences.params import SamplingParams
from support.answering_engine import AnsweringEngine
from support.fake_answerer import FakeAnswerer

SAMPLING = SamplingParams(temperature=0.0, max_tokens=5)


def test_plain_and_speculative_differ_only_in_the_size_of_the_tree() -> None:
    engine = AnsweringEngine()
    for draft in (AS_CONFIGURED, PLAIN):
        EngineDecoder("any", engine, draft).generate((1, 2), SAMPLING)
    drafting, plain = engine.requests
    assert (drafting.prompt, drafting.sampling) == (plain.prompt, plain.sampling)
    assert (drafting.draft, plain.draft) == ({}, {"max_nodes": 0})


def test_an_answer_brings_its_times_and_counts() -> None:
    answer = EngineDecoder("outrider", AnsweringEngine(), AS_CONFIGURED).generate((1, 2), SAMPLING)
    assert len(answer.tokens) == len(answer.token_times_s) == 5
    stats = answer.stats
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted) == (5, 10, 5)
    assert (stats.depth_drafted, stats.depth_accepted) == ((2, 1), (1, 1))


def test_only_processes_that_count_their_time_are_asked_for_it() -> None:
    engine = AnsweringEngine()
    decoder = EngineDecoder("outrider", engine, AS_CONFIGURED)
    decoder.generate((1, 2), SAMPLING)
    assert decoder.busy_seconds() == {
        "draft": {"forward": 0.001, "wait": 1.0},
        "target 0": {"forward": 0.001, "wait": 1.0},
    }


def test_every_field_of_the_sampling_is_sent_so_that_no_default_of_the_config_gets_in() -> None:
    engine = AnsweringEngine()
    EngineDecoder("plain", engine, PLAIN).generate((1,), SAMPLING)
    assert SamplingParams(**engine.requests[0].sampling) == SAMPLING  # type: ignore[arg-type]


def test_a_failed_request_ends_the_benchmark() -> None:
    engine = AnsweringEngine(error="prompt must be shorter")
    with pytest.raises(ValueError, match="prompt must be shorter"):
        EngineDecoder("plain", engine, PLAIN).generate((1,), SAMPLING)


def test_questions_are_answered_in_order_in_one_call() -> None:
    fake = FakeAnswerer()
    questions = [
        Question((1, token), SAMPLING, speculative) for token in (2, 3) for speculative in (True, False)
    ]
    answers = EngineAnswerer(AnsweringEngine(fake)).answer(questions)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in fake.answer(questions)]
    assert [answer.stats.num_drafted for answer in answers] == [10, 0, 10, 0]
