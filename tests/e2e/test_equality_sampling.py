"""Speculative == plain == transformers with the shared noise, seed for seed, whatever a request asks of the law."""

from dataclasses import replace

import pytest

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.weights.source import WeightSource
from support.equality import PLAIN, Case, Reference, assert_same_tokens, decode, num_accepted
from support.local_engine import LocalEngine, default_options
from support.thread_group import thread_group
from support.tiny import BOTH, METHODS, VOCAB_SIZE, tiny_cases

WARM = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=16)
PENALTIES = replace(WARM, repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2)
BIAS = ((3, 4.0), (100, -100.0), (VOCAB_SIZE - 1, 2.5))
SAMPLINGS = {
    "nothing but the temperature": replace(WARM, top_p=1.0),
    "top_p": WARM,
    "top_k": replace(WARM, top_p=1.0, top_k=5),
    "min_p": replace(WARM, top_p=1.0, min_p=0.1),
    "logit_bias": replace(WARM, logit_bias=BIAS),
    # Two tokens win nearly always: the output repeats itself, so that lookup is often right.
    "repetition": replace(WARM, logit_bias=((3, 12.0), (7, 12.0)), presence_penalty=0.3),
    "penalties": PENALTIES,
    "negative penalties": replace(
        WARM, repetition_penalty=0.9, presence_penalty=-0.3, frequency_penalty=-0.1
    ),
    "everything": replace(PENALTIES, temperature=1.3, top_k=40, min_p=0.02, logit_bias=BIAS),
    "greedy with penalties": replace(PENALTIES, temperature=0.0, logit_bias=BIAS),
}


def all_cases() -> list[Case]:
    """Each sampling with each of a few prompts; all seeds differ, and some need 64 bits."""
    cases = []
    for i, (name, sampling) in enumerate(SAMPLINGS.items()):
        for case in tiny_cases(((5, 40), (130, 99))[i % 2], sampling):
            seed = 10 * i + case.sampling.seed + (2**63 if i % 2 else 0)
            cases.append(replace(case, id=f"{name}, {case.id}", sampling=replace(sampling, seed=seed)))
    return cases


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_sampled_text_is_the_same_for_every_method_and_rank_count(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch], tp_size: int
) -> None:
    cases = all_cases()
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=default_options(fixed_budget=True),
        max_sequences=10,
    ) as engine:
        plain = decode(engine, cases, PLAIN)
        for case in cases:
            expected = reference.text(case)
            assert_same_tokens(reference, case, expected, plain[case.id].tokens, ties, f"plain, tp {tp_size}")
        for method, draft in METHODS.items():
            texts = decode(engine, cases, draft)
            assert num_accepted(texts) > 0
            for case in cases:
                expected, actual = plain[case.id].tokens, texts[case.id].tokens
                assert_same_tokens(reference, case, expected, actual, ties, f"{method}, tp {tp_size}")


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_sampled_text_is_the_same_for_every_loop(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    overlapped: bool,
    num_lanes: int,
) -> None:
    cases = all_cases()[::3]
    options = default_options(overlapped=overlapped, num_lanes=num_lanes, fixed_budget=True)
    with LocalEngine(target, drafter, options=options) as engine:
        texts = decode(engine, cases, BOTH)
        texts |= decode(engine, cases[:3], BOTH)
        assert num_accepted(texts) > 0
        for case in cases:
            assert_same_tokens(reference, case, reference.text(case), texts[case.id].tokens, ties, "both")


def test_seeds_differ(reference: Reference) -> None:
    """Otherwise "seed for seed" would say nothing."""
    (case,) = tiny_cases((40,), WARM)
    texts = {reference.text(replace(case, sampling=replace(WARM, seed=seed))) for seed in range(6)}
    assert len(texts) == 6


@pytest.mark.parametrize("method", METHODS)
def test_stop_tokens_end_a_text_where_plain_decoding_ends_it(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch], method: str
) -> None:
    """A stop token may come as a draft in the middle of an accepted path: what follows it must not come out."""
    cases = []
    for case in tiny_cases():
        stop = reference.text(case)[8 + case.sampling.seed % 5]
        cases.append(replace(case, sampling=replace(case.sampling, stop_token_ids=(stop,))))
    with LocalEngine(target, drafter, options=default_options(fixed_budget=True)) as engine:
        for draft in (PLAIN, METHODS[method]):
            texts = decode(engine, cases, draft)
            for case in cases:
                text = texts[case.id]
                assert_same_tokens(reference, case, reference.text(case), text.tokens, ties, method)
                assert text.finish_reason == "stop"
                assert text.tokens[-1] in case.sampling.stop_token_ids
