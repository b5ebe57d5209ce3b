"""The quick start as it is deployed: processes on a Ray of its own, and still the text of one process."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import ray

from outrider.cluster.bench.identity import Mismatch
from outrider.cluster.engine import Engine
from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from support.asked_engine import WARM, ask
from support.equality import PLAIN, assert_same_tokens, decode
from support.local_engine import LocalEngine
from support.smollm2 import load_smollm2
from support.tiny import NGRAM

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a deployment needs two CPUs")


def test_the_quickstart_gives_the_text_of_one_process_and_of_transformers(ties: list[Mismatch]) -> None:
    smollm2 = load_smollm2()
    cases = [*smollm2.shipped, *smollm2.spec_bench[:1]]
    warm = replace(WARM, stop_token_ids=cases[0].sampling.stop_token_ids)
    # As many as run at once; test_equality_smollm2.py has more.
    cases += [replace(case, id=f"warm {case.id}", sampling=warm) for case in cases[:2]]
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
