"""A real target and a real draft model: Qwen2.5-Coder 1.5B and 0.5B, where OUTRIDER_TEST_PAIR says they are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from outrider.cluster.bench.identity import Mismatch
from outrider.cluster.bench.prompts import SHIPPED_PROMPTS, encode, load_prompts
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.tokenizer import load_tokenizer
from support.equality import PLAIN, Case, Reference, assert_same_tokens, decode, num_accepted
from support.local_engine import LocalEngine, default_options
from support.models import coder_pair
from support.thread_group import thread_group
from support.tiny import METHODS

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Pair:
    engine: LocalEngine
    reference: Reference
    cases: list[Case]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp 1", "tp 2"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    target, drafter = coder_pair()
    tokenizer = load_tokenizer(target)
    source = open_source(target)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=24, stop_token_ids=tuple(source.config.eos_token_ids)
    )
    prompts = load_prompts(SHIPPED_PROMPTS)
    cases = [Case(prompt.id, encode(prompt, tokenizer, "chat"), sampling) for prompt in prompts]
    cases.sort(key=lambda case: len(case.prompt))
    with LocalEngine(
        source,
        open_source(drafter),
        communicators=thread_group(request.param),
        options=default_options(fixed_budget=True),
        num_pages=160,
    ) as engine:
        yield Pair(engine, Reference(target), cases[:4])


def test_both_methods_give_the_text_of_transformers(pair: Pair, ties: list[Mismatch]) -> None:
    plain = decode(pair.engine, pair.cases, PLAIN)
    for case in pair.cases:
        expected = pair.reference.text(case)
        assert_same_tokens(pair.reference, case, expected, plain[case.id].tokens, ties, "pair, plain")
    for method, draft in METHODS.items():
        texts = decode(pair.engine, pair.cases, draft)
        assert num_accepted(texts) > 0 or method == "ngram"
        for case in pair.cases:
            expected, actual = plain[case.id].tokens, texts[case.id].tokens
            assert_same_tokens(pair.reference, case, expected, actual, ties, f"pair, {method}")


def test_both_methods_give_the_sampled_text_of_plain_decoding(pair: Pair, ties: list[Mismatch]) -> None:
    warm = replace(
        pair.cases[0].sampling,
        temperature=0.8,
        top_p=0.95,
        repetition_penalty=1.05,
        presence_penalty=0.2,
        frequency_penalty=0.1,
    )
    cases = [replace(case, sampling=replace(warm, seed=i)) for i, case in enumerate(pair.cases[:2])]
    plain = decode(pair.engine, cases, PLAIN)
    for method in ("model", "both"):
        texts = decode(pair.engine, cases, METHODS[method])
        assert num_accepted(texts) > 0
        for case in cases:
            expected, actual = plain[case.id].tokens, texts[case.id].tokens
            assert_same_tokens(pair.reference, case, expected, actual, ties, f"pair, {method}, T = 0.8")
