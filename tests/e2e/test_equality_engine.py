"""Real processes on Ray, shared memory between ranks, gloo to the drafter: still the text of one process."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import ray

from outrider.cluster.api import GenerationRequest
from outrider.cluster.bench.identity import Mismatch
from outrider.cluster.engine import Engine
from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.workers.answer import Completion
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import ResolvedModel, open_source, resolve
from support.equality import PLAIN, Case, Reference, assert_same_tokens, decode
from support.local_engine import LocalEngine
from support.smollm2 import load_smollm2
from support.tiny import BOTH, METHODS, NGRAM, tiny_cases

WARM = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    max_tokens=20,
)

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a deployment needs two CPUs")


@pytest.mark.parametrize(("tp_size", "all_reduce"), [(2, "gloo"), (3, "shm")])
def test_a_tiny_deployment_gives_the_text_of_one_process_and_of_transformers(
    ties: list[Mismatch], tmp_path: Path, tp_size: int, all_reduce: str
) -> None:
    overrides = [
        f"target.tp_size={tp_size}",
        f"target.all_reduce={all_reduce}",
        "cluster.num_cpus_per_target=0.3",
        "tree.max_nodes=12",
    ]
    config = load_config("tiny-random", overrides)
    target, drafter = (
        resolve(model, tmp_path, silent, "model") for model in (config.target.model, config.draft.model)
    )
    reference = Reference(target)
    cases = tiny_cases() + [replace(c, id=f"warm {c.id}") for c in tiny_cases(sampling=WARM)]
    with deployed(config) as engine:
        plain = ask(engine, cases, PLAIN)
        drafted = {method: ask(engine, cases, draft) for method, draft in METHODS.items()}
    local = decode_locally(target, drafter, cases, BOTH)
    for case in cases:
        expected = reference.text(case)
        assert_same_tokens(reference, case, expected, local[case.id], ties, "one process")
        assert_same_tokens(reference, case, expected, plain[case.id].tokens, ties, "plain on Ray")
        for method, answers in drafted.items():
            assert_same_tokens(
                reference, case, plain[case.id].tokens, answers[case.id].tokens, ties, f"{method} on Ray"
            )
    for answers in drafted.values():
        assert sum(answer.stats.num_accepted for answer in answers.values()) > 0


def test_the_quickstart_gives_the_text_of_one_process_and_of_transformers(ties: list[Mismatch]) -> None:
    smollm2 = load_smollm2()
    cases = [*smollm2.shipped, *smollm2.spec_bench[:36:9]]
    warm = replace(WARM, stop_token_ids=cases[0].sampling.stop_token_ids)
    cases += [replace(case, id=f"warm {case.id}", sampling=warm) for case in cases[:3]]
    with deployed(load_config("quickstart")) as engine:
        plain = ask(engine, cases, PLAIN)
        drafted = ask(engine, cases, NGRAM)
    with LocalEngine(smollm2.source) as local_engine:
        local = decode(local_engine, cases, NGRAM)
    for case in cases:
        tokens = plain[case.id].tokens
        if case.sampling.is_greedy:
            expected = smollm2.reference.text(case)
            assert_same_tokens(smollm2.reference, case, expected, tokens, ties, "plain on Ray")
        assert_same_tokens(smollm2.reference, case, tokens, local[case.id].tokens, ties, "one process")
        assert_same_tokens(smollm2.reference, case, tokens, drafted[case.id].tokens, ties, "ngram on Ray")
    assert sum(answer.stats.num_accepted for answer in drafted.values()) > 0


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


def ask(engine: Engine, cases: list[Case], draft: DraftOptions) -> Mapping[str, Completion]:
    """All cases at once, their stop tokens instead of the model's."""
    answers = engine.generate(
        [
            GenerationRequest(
                case.prompt,
                {**case.sampling.request_fields(), "ignore_eos": True},
                {"max_nodes": 0} if draft == PLAIN else asdict(draft),
            )
            for case in cases
        ]
    )
    assert not any(answer.error for answer in answers), [answer.error for answer in answers]
    return {case.id: answer for case, answer in zip(cases, answers, strict=True)}


def decode_locally(
    target: ResolvedModel, drafter: ResolvedModel, cases: list[Case], draft: DraftOptions
) -> Mapping[str, tuple[int, ...]]:
    with LocalEngine(open_source(target), open_source(drafter)) as engine:
        return {case_id: text.tokens for case_id, text in decode(engine, cases, draft).items()}
