"""A real model: SmolLM2-135M in float32, prompts of Spec-Bench (long ones included) against transformers' greedy."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import ray

from outrider.cluster.bench.identity import Mismatch
from outrider.cluster.engine import Engine
from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.workers.rounds.budget import PassProfile
from outrider.workers.rounds.loop import LoopOptions
from support.asked_engine import WARM, ask
from support.equality import (
    PLAIN,
    Case,
    Text,
    assert_same_tokens,
    decode,
    decode_singly,
    num_accepted,
)
from support.local_engine import LocalEngine, default_options
from support.smollm2 import LONG, NUM_SPEC_BENCH, SPEC_BENCH, SmolLM2, load_smollm2
from support.thread_group import thread_group
from support.tiny import NGRAM

# Seconds per pass on two cores, so that a measured budget drafts as it would in use.
PROFILE = PassProfile((1, 8, 64), (0.03, 0.035, 0.15))
FIXED = default_options(fixed_budget=True)


@pytest.fixture(scope="module")
def smollm2() -> SmolLM2:
    smollm2 = load_smollm2()
    smollm2.reference.prepare(smollm2.all_cases, batch_size=8)
    return smollm2


@pytest.fixture(scope="module")
def solo(smollm2: SmolLM2) -> Iterator[LocalEngine]:
    """One rank; room for all prompts, so that the second run of a prompt finds its pages."""
    with open_engine(smollm2, 1, FIXED) as engine:
        yield engine


@pytest.fixture(scope="module")
def pair(smollm2: SmolLM2) -> Iterator[LocalEngine]:
    """Two ranks: 9 query heads and 3 KV heads do not divide. The budget is the measured one."""
    with open_engine(smollm2, 2, default_options()) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(smollm2: SmolLM2, solo: LocalEngine) -> Mapping[str, Text]:
    """Plain decoding on one rank."""
    return decode(solo, smollm2.all_cases, PLAIN)


@pytest.mark.parametrize("data", ["shipped", "spec_bench"])
def test_plain_decoding_gives_the_text_of_transformers(
    smollm2: SmolLM2, plain: Mapping[str, Text], ties: list[Mismatch], data: str
) -> None:
    reference = smollm2.reference
    for case in chosen(smollm2, data):
        assert_same_tokens(reference, case, reference.text(case), plain[case.id].tokens, ties, "plain")


@pytest.mark.parametrize("data", ["shipped", "spec_bench"])
@pytest.mark.parametrize("ranks", ["solo", "pair"])
def test_lookup_gives_the_text_of_plain_decoding(
    request: pytest.FixtureRequest,
    smollm2: SmolLM2,
    plain: Mapping[str, Text],
    ties: list[Mismatch],
    ranks: str,
    data: str,
) -> None:
    engine: LocalEngine = request.getfixturevalue(ranks)
    # Two ranks have not read the prompts before, which is what takes the time: every other one, a long one too.
    cases = chosen(smollm2, data)[:: 1 if ranks == "solo" or data == "shipped" else 2]
    assert data == "shipped" or max(len(case.prompt) for case in cases) > LONG
    texts = decode(engine, cases, NGRAM)
    check(smollm2, cases, plain, texts, ties, f"ngram, {ranks}")
    assert num_accepted(texts) > 0


def test_one_request_at_a_time_gives_the_same_text(
    smollm2: SmolLM2, plain: Mapping[str, Text], solo: LocalEngine, ties: list[Mismatch]
) -> None:
    cases = [*smollm2.shipped, *smollm2.spec_bench[:25:6]]
    texts = decode_singly(solo, cases, NGRAM)
    check(smollm2, cases, plain, texts, ties, "ngram, one by one")
    assert num_accepted(texts) > 0
    assert all(text.stats.num_cached_prompt_tokens > 0 for text in texts.values())


def test_sampled_text_is_that_of_plain_decoding_seed_for_seed(
    smollm2: SmolLM2, pair: LocalEngine, ties: list[Mismatch]
) -> None:
    """T = 0.8, top-p 0.95 and penalties, the same prompt under several seeds."""
    some = [*smollm2.shipped[::2], *smollm2.spec_bench[:1]]
    cases = [
        replace(
            case,
            id=f"{case.id}, seed {seed}",
            sampling=replace(
                case.sampling,
                temperature=0.8,
                top_p=0.95,
                repetition_penalty=1.1,
                presence_penalty=0.2,
                frequency_penalty=0.1,
                seed=seed,
            ),
        )
        for seed in range(2)
        for case in some
    ]
    texts = decode(pair, cases, PLAIN)
    assert num_accepted(texts) == 0
    check(smollm2, cases, texts, decode(pair, cases, NGRAM), ties, "ngram, T = 0.8")
    for case in cases[1:2]:  # transformers, with the same noise: one, since it is slow
        expected = smollm2.reference.text(case)
        assert_same_tokens(smollm2.reference, case, expected, texts[case.id].tokens, ties, "plain, T = 0.8")


def test_three_ranks_give_the_same_text(
    smollm2: SmolLM2, plain: Mapping[str, Text], ties: list[Mismatch]
) -> None:
    cases = [*smollm2.shipped[::2], *smollm2.spec_bench[:25:8]]
    with open_engine(smollm2, 3, FIXED) as engine:
        texts = decode(engine, cases, NGRAM)
    check(smollm2, cases, plain, texts, ties, "ngram, tp 3")
    assert num_accepted(texts) > 0


def test_scarce_pages_small_chunks_and_a_serial_loop_give_the_same_text(
    smollm2: SmolLM2, plain: Mapping[str, Text], ties: list[Mismatch]
) -> None:
    cases = [*smollm2.shipped, *smollm2.spec_bench[:25:8]]
    longest = max(len(case.prompt) + case.sampling.max_tokens for case in cases)
    with LocalEngine(
        smollm2.source,
        options=default_options(overlapped=False, fixed_budget=True),
        num_pages=longest // 16 + 3,
        prefill_chunk=48,
        prefix_sharing=False,
    ) as engine:
        texts = decode(engine, cases, NGRAM)
    check(smollm2, cases, plain, texts, ties, "ngram, scarce pages")
    assert sum(text.stats.num_recomputed for text in texts.values()) > 0


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a deployment needs two CPUs")
def test_the_quickstart_gives_the_text_of_one_process_and_of_transformers(
    smollm2: SmolLM2, solo: LocalEngine, ties: list[Mismatch]
) -> None:
    """As it is deployed: processes on a Ray of its own."""
    cases = [*smollm2.shipped, *smollm2.spec_bench[:1]]
    warm = replace(WARM, stop_token_ids=cases[0].sampling.stop_token_ids)
    # As many as run at once.
    cases += [replace(case, id=f"warm {case.id}", sampling=warm) for case in cases[:2]]
    with deployed(load_config("quickstart")) as engine:
        on_ray = ask(engine, cases, PLAIN)
        drafted = ask(engine, cases, NGRAM)
    local = decode(solo, cases, NGRAM)
    for case in cases:
        tokens = on_ray[case.id].tokens
        if case.sampling.is_greedy:
            expected = smollm2.reference.text(case)
            assert_same_tokens(smollm2.reference, case, expected, tokens, ties, "plain on Ray")
        assert_same_tokens(smollm2.reference, case, tokens, local[case.id].tokens, ties, "one process")
        assert_same_tokens(smollm2.reference, case, tokens, drafted[case.id].tokens, ties, "ngram on Ray")
    assert sum(answer.stats.num_accepted for answer in drafted.values()) > 0


def open_engine(smollm2: SmolLM2, tp_size: int, options: LoopOptions) -> LocalEngine:
    return LocalEngine(
        smollm2.source,
        communicators=thread_group(tp_size),
        options=options,
        profile=PROFILE,
        num_pages=640,
        max_round_tokens=384,
        prefill_chunk=256,
    )


def chosen(smollm2: SmolLM2, data: str) -> list[Case]:
    if data == "shipped":
        return smollm2.shipped
    if not smollm2.spec_bench:
        pytest.skip(f"no {SPEC_BENCH}")
    assert len(smollm2.spec_bench) == NUM_SPEC_BENCH
    assert max(len(case.prompt) for case in smollm2.spec_bench) > 1024
    return smollm2.spec_bench


def check(
    smollm2: SmolLM2,
    cases: list[Case],
    plain: Mapping[str, Text],
    texts: Mapping[str, Text],
    ties: list[Mismatch],
    what: str,
) -> None:
    for case in cases:
        assert_same_tokens(smollm2.reference, case, plain[case.id].tokens, texts[case.id].tokens, ties, what)


@contextmanager
def deployed(config: Config) -> Iterator[Engine]:
    """A deployment with a Ray of its own; afterwards none of its processes may be left."""
    here = psutil.Process()
    before = children_of(here)
    assert not ray.is_initialized()
    with Engine.start(config) as engine:
        pids = {stats["pid"] for name, stats in engine.stats().items() if name != "coordinator"}
        assert len(pids) == config.target.tp_size + 1
        yield engine
    assert not ray.is_initialized()
    limit = time.monotonic() + 30
    while running := [pid for pid in pids | children_of(here) if pid not in before and is_alive(pid)]:
        assert time.monotonic() < limit, running
        time.sleep(0.1)


def children_of(process: psutil.Process) -> set[int]:
    return {child.pid for child in process.children(recursive=True)}


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
