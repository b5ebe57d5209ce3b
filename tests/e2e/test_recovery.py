"""Workers are killed in the middle of their work, on real Ray: the texts are what they would have been."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from outrider.cluster.api import EngineError, GenerationRequest
from outrider.cluster.engine import Engine
from outrider.cluster.session import RaySession
from outrider.configs.loader import load_config
from outrider.configs.schema import ClusterConfig
from support.harm import (
    PLAIN,
    Listener,
    actor_pids,
    all_stand,
    asked,
    coordinator_pids,
    kill,
    shared_memory,
    worker_pids,
)
from support.waiting import wait_until

TWO_RANKS = ["target.tp_size=2", "cluster.num_cpus_per_target=0.5"]
TESTS = Path(__file__).parents[1]
LONG_S = 120.0  # a machine with other work starts a process in seconds

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two CPUs")


@pytest.fixture(scope="module")
def ray_with_room() -> Iterator[None]:
    with RaySession(ClusterConfig(), num_cpus=8):
        yield


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_texts_are_those_of_plain_decoding_whoever_is_killed_meanwhile(ray_with_room: None) -> None:
    with Engine.start(load_config("tiny-random", TWO_RANKS)) as engine:
        requests = [asked(number, 200) for number in range(6)]
        plain = engine.generate([GenerationRequest(r.prompt, r.sampling, PLAIN) for r in requests])
        pids = set(worker_pids(engine).values())
        for name in ("draft", "target 1"):
            streams = [Listener(engine, request) for request in requests]
            wait_until(lambda streams=streams: all(stream.tokens for stream in streams), LONG_S)
            kill(worker_pids(engine)[name])
            for stream in streams:
                stream.join(LONG_S)
            assert [stream.end for stream in streams] == ["length"] * len(streams)
            assert [tuple(stream.tokens) for stream in streams] == [answer.tokens for answer in plain]
            assert [stream.text for stream in streams] == [answer.text for answer in plain]
            wait_until(lambda: all_stand(engine), LONG_S)
            pids |= set(worker_pids(engine).values())
        assert len(pids) == 5
        assert engine.stats()["coordinator"]["num_restarts"] == 2
        assert not engine.failure
        assert not engine.restarting
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), LONG_S)


def test_spares_take_the_places_of_a_rank_and_of_the_coordinator(ray_with_room: None) -> None:
    with Engine.start(load_config("tiny-random", [*TWO_RANKS, "cluster.spares=true"])) as engine:
        requests = [asked(number, 150) for number in range(4)]
        plain = engine.generate([GenerationRequest(r.prompt, r.sampling, PLAIN) for r in requests])
        ranks = {worker_pids(engine)[f"target {rank}"] for rank in (0, 1)}
        wait_until(lambda: len(coordinator_pids()) == 2 and len(actor_pids("TargetActor")) == 4, LONG_S)
        coordinator, successor = sorted(coordinator_pids(), key=lambda pid: psutil.Process(pid).create_time())
        spares = set(actor_pids("TargetActor")) - ranks
        streams = [Listener(engine, request) for request in requests]
        wait_until(lambda: all(stream.tokens for stream in streams), LONG_S)
        kill(worker_pids(engine)["target 1"])
        for stream in streams:
            stream.join(LONG_S)
        after = worker_pids(engine)
        assert after["target 0"] in ranks
        assert after["target 1"] in spares
        streams += [Listener(engine, request) for request in requests]
        kill(coordinator)
        for stream in streams:
            stream.join(LONG_S)
        assert [tuple(stream.tokens) for stream in streams] == 2 * [answer.tokens for answer in plain]
        assert worker_pids(engine) == after
        wait_until(lambda: len(actor_pids("TargetActor")) == 4, LONG_S)
        dead = set(actor_pids("TargetActor")) - set(after.values())
        for spare in dead:
            kill(spare)
        kill(after["target 0"])  # a spare that is dead takes nobody's place
        answers = engine.generate(requests)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]
        num_before = engine.stats()["coordinator"]["num_restarts"]
        kill(successor)
        answers = engine.generate(requests)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]
        assert engine.stats()["coordinator"]["num_restarts"] == num_before + 1
        wait_until(lambda: len(set(actor_pids("TargetActor")) - dead) == 4, LONG_S)
        pids = [*actor_pids("TargetActor"), *coordinator_pids()]
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), LONG_S)


@pytest.mark.slow  # eight processes, for what test_draft_rank.py shows without Ray
def test_a_drafter_of_several_ranks_goes_as_one_and_the_target_stays(ray_with_room: None) -> None:
    with Engine.start(load_config("tiny-random", [*TWO_RANKS, "draft.tp_size=3"])) as engine:
        requests = [asked(number, 150) for number in range(4)]
        plain = engine.generate([GenerationRequest(r.prompt, r.sampling, PLAIN) for r in requests])
        before = worker_pids(engine)
        drafters = ("draft", "draft 1", "draft 2")
        assert sorted(before) == [*drafters, "target 0", "target 1"]
        streams = [Listener(engine, request) for request in requests]
        wait_until(lambda: all(stream.tokens for stream in streams), LONG_S)
        kill(before["draft 1"])
        for stream in streams:
            stream.join(LONG_S)
        assert [tuple(stream.tokens) for stream in streams] == [answer.tokens for answer in plain]
        wait_until(lambda: all_stand(engine, 5), LONG_S)
        after = worker_pids(engine)
        assert not any(psutil.pid_exists(before[name]) for name in drafters)
        assert [after[name] for name in ("target 0", "target 1")] == [before["target 0"], before["target 1"]]
        answers = engine.generate(requests)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]
        assert sum(answer.stats.num_accepted for answer in answers) > 0
        assert engine.stats()["coordinator"]["num_restarts"] == 1
    wait_until(lambda: not any(map(psutil.pid_exists, after.values())), LONG_S)


def test_another_coordinator_goes_on_with_the_same_workers_until_too_many_were_lost(
    ray_with_room: None,
) -> None:
    with Engine.start(load_config("tiny-random", [*TWO_RANKS, "cluster.max_restarts=1"])) as engine:
        requests = [asked(number, 200) for number in range(5)]
        texts = [answer.text for answer in engine.generate(requests[:1])]
        stop = texts[0][len(texts[0]) * 3 // 4 :][:3]
        requests[0] = GenerationRequest(requests[0].prompt, {**requests[0].sampling, "stop": [stop]})
        plain = engine.generate([GenerationRequest(r.prompt, r.sampling, PLAIN) for r in requests])
        pids = worker_pids(engine)
        streams = [Listener(engine, request) for request in requests[:4]]
        left = engine.stream(requests[4].prompt, requests[4].sampling)
        whole = engine.completions(requests)
        next(left)
        wait_until(lambda: all(stream.tokens for stream in streams), LONG_S)
        kill(*coordinator_pids())
        wait_until(lambda: bool(engine.restarting), LONG_S)
        left.close()  # while there is no Coordinator
        late = Listener(engine, requests[1])
        for stream in [*streams, late]:
            stream.join(LONG_S)
        answers = [plain[0], plain[1], plain[2], plain[3], plain[1]]
        assert [stream.end for stream in [*streams, late]] == [answer.finish_reason for answer in answers]
        assert [tuple(stream.tokens) for stream in [*streams, late]] == [answer.tokens for answer in answers]
        assert [stream.text for stream in [*streams, late]] == [answer.text for answer in answers]
        assert [(answer.tokens, answer.text) for answer in whole] == [(a.tokens, a.text) for a in plain]
        assert worker_pids(engine) == pids
        said = engine.stats()["coordinator"]
        assert (said["num_open_requests"], said["num_restarts"]) == (0, 1)
        (second,) = coordinator_pids()
        kill(second)
        wait_until(lambda: bool(coordinator_pids()) and coordinator_pids() != [second], LONG_S)
        kill(*coordinator_pids())  # before it has done anything
        with pytest.raises(EngineError, match=r"^the Coordinator died: .*max_restarts = 1 in vain$"):
            list(engine.stream("x", {"max_tokens": 400, "ignore_eos": True}))
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids.values()), LONG_S)


def test_of_a_program_that_is_killed_nothing_stays() -> None:
    """No process of its Ray, no worker, no shared memory."""
    command = [sys.executable, "-m", "support.left_alone"]
    program = subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "streams\n"
        started = psutil.Process(program.pid).children(recursive=True)
        assert sum("ray::TargetActor" in " ".join(process.cmdline()) for process in started) == 2
        memory = shared_memory(started)
    finally:
        program.kill()
    program.wait()
    begun_s = time.monotonic()
    wait_until(lambda: not any(is_alive(process) for process in started), LONG_S)
    assert time.monotonic() - begun_s < 45.0  # Ray's agents alone would take a minute
    assert not any(path.exists() for path in memory)


@pytest.mark.slow  # a Ray of its own, for what test_ray_watch.py shows in parts
def test_a_program_whose_ray_has_lost_its_head_ends_with_the_reason_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "support.left_alone"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=TESTS, stdout=pipe, stderr=pipe, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "streams\n"
        started = psutil.Process(program.pid).children(recursive=True)
        (head,) = [process for process in started if "gcs_server" in process.name()]
        head.kill()
        last = program.stderr.read().splitlines()[-1]
    assert program.returncode == 1
    assert last.endswith(
        "EngineError: Ray's gcs_server, which was started for this, has ended; its logs in /tmp/ray may say why"
    )
    wait_until(lambda: not any(is_alive(process) for process in started), LONG_S)
