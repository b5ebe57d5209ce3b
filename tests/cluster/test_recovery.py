"""What is lost when workers are: nothing. The Coordinator on fake workers, which die, hang and fail at will."""

import asyncio
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from outrider.cluster import health, restarts
from outrider.cluster.api import EngineError, GenerationRequest, Piece
from outrider.cluster.restarts import Restarts
from outrider.configs.schema import ClusterConfig
from support import fake_workers
from support.fake_workers import FAKE_CONFIG, FakeDeployment, FakeTarget
from support.stories import (
    ALL,
    STORY,
    die,
    fail,
    hang,
    some_pieces,
    text_of,
    ticket,
    with_deployment,
)
from support.waiting import until


@pytest.mark.parametrize("harm", [die, fail, hang])
@pytest.mark.parametrize("name", ALL)
def test_texts_go_on_whatever_becomes_of_a_worker(
    name: str, harm: Callable[[FakeTarget], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_AFTER_OTHERS_S", 0.3)
    cluster = ClusterConfig(heartbeat_timeout_s=0.5)

    async def scenario(fake: FakeDeployment) -> None:
        before = await some_pieces(fake.coordinator)
        lost, survivors = fake.crew.workers[name], [w for n, w in fake.crew.workers.items() if n != name]
        fake.draft.silent.set()
        harm(lost)
        pieces = list(before)
        last = (await text_of(fake.coordinator, pieces))["a"]
        assert "".join(piece.text for piece in pieces) == STORY[:100]
        assert sum(len(piece.tokens) for piece in pieces) == sum(len(p.logprobs) for p in pieces) == 100
        assert last.finish_reason == "length"
        assert last.stats.num_rounds == 34  # the account goes on, too
        assert fake.crew.spawned == [*ALL, name]
        assert lost.was_killed
        # The others stay: ranks that only lost the DraftWorker keep their group, else all meet again.
        for worker in survivors:
            assert not worker.was_killed
            assert worker.calls.count(("load",)) == 1
            met_again = ("relink", 1) if name == "draft" else ("connect", 1)
            assert met_again in worker.calls
        assert (await fake.coordinator.stats())["coordinator"]["num_restarts"] == 1

    with_deployment(scenario, replace(FAKE_CONFIG, cluster=cluster))


def test_whole_answers_and_requests_that_come_meanwhile_are_all_answered() -> None:
    async def scenario(fake: FakeDeployment) -> None:
        gate = threading.Event()
        fake.crew.prepare_next["target 1"] = lambda target: setattr(target, "load", gate.wait)
        fake.draft.silent.set()
        await fake.coordinator.submit([ticket(f"early {i}", whole=True) for i in range(5)])
        await until(lambda: len(fake.draft.submitted) == 5)
        fake.targets[1].kill()
        while not (await fake.coordinator.take(0.0)).restarting:
            await asyncio.sleep(0.01)
        restarting = (await fake.coordinator.take(0.0)).restarting
        assert restarting == "target 1 died during run: its process is gone"
        await fake.coordinator.submit([ticket(f"late {i}", whole=True) for i in range(5)])
        assert list(await fake.coordinator.stats()) == ["coordinator"]
        gate.set()
        answers = await text_of(fake.coordinator, [], 10)
        assert {answer.text for answer in answers.values()} == {STORY[:100]}
        assert (await fake.coordinator.take(0.0)).restarting == ""

    with_deployment(scenario)


def test_texts_go_on_while_the_next_draft_worker_loads_and_when_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(fake: FakeDeployment) -> None:
        gate, rank_0 = threading.Event(), fake.targets[0]
        stand_in = rank_0.inner
        before = await some_pieces(fake.coordinator)
        fake.crew.prepare_next["draft"] = lambda draft: setattr(draft, "load", gate.wait)
        fake.draft.kill()
        pieces = list(before)
        await text_of(fake.coordinator, pieces)  # the gate is closed
        assert "".join(piece.text for piece in pieces) == STORY[:100]
        assert [request.id for request in stand_in.submitted] == ["a"]
        assert [call for call in stand_in.calls if call != ("load",)] == [
            ("connect", 1),
            ("take_over", "measured"),
        ]
        stats = await fake.coordinator.stats()
        assert list(stats) == ["draft", "target 0", "target 1", "coordinator"]

        # In the middle of a text the DraftWorker comes back, and another one dies while it loads.
        monkeypatch.setattr(fake_workers, "ROUND_S", 0.02)
        pieces = await some_pieces(fake.coordinator)
        gate.set()
        await until(lambda: len(fake.draft.submitted) == 1)
        fake.crew.prepare_next["draft"] = lambda draft: setattr(draft, "load", draft.kill)
        fake.draft.kill()
        await text_of(fake.coordinator, pieces)
        assert "".join(piece.text for piece in pieces) == STORY[:100]
        await until(lambda: fake.crew.spawned == [*ALL, "draft", "draft", "draft"])
        await until(lambda: ("take_over", "measured") in fake.draft.calls)
        assert not any(target.was_killed for target in fake.targets)
        assert ("connect", 1) not in rank_0.calls

    with_deployment(scenario)


def test_a_rank_that_dies_with_the_stand_in_inside_takes_no_text_along() -> None:
    async def scenario(fake: FakeDeployment) -> None:
        gate = threading.Event()
        pieces = await some_pieces(fake.coordinator)
        fake.crew.prepare_next["draft"] = lambda draft: setattr(draft, "load", gate.wait)
        fake.draft.kill()
        stand_in = fake.targets[0].inner
        await until(lambda: len(stand_in.submitted) == 1)
        stand_in.silent.set()
        fake.targets[0].kill()
        await text_of(fake.coordinator, pieces)
        assert "".join(piece.text for piece in pieces) == STORY[:100]
        assert fake.crew.spawned == [*ALL, "draft", "target 0"]
        gate.set()

    with_deployment(scenario)


def test_what_had_ended_but_for_its_last_word_ends_with_the_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string was met, or its reader left, and the DraftWorker had no time to say so."""
    monkeypatch.setattr(fake_workers, "ROUND_S", 0.05)

    async def scenario(fake: FakeDeployment) -> None:
        stopped = GenerationRequest("x", {"max_tokens": 100, "stop": ["story"]})
        told = threading.Event()

        def cancel(request_id: str) -> None:
            told.set()
            fake.draft.silent.set()

        fake.draft.cancel = cancel  # type: ignore[method-assign]
        await fake.coordinator.submit([ticket("stopped", stopped, whole=True), ticket("left", whole=True)])
        await until(told.is_set)
        await fake.coordinator.cancel(["left"])
        fake.targets[1].kill()
        answers = await text_of(fake.coordinator, [], 2)
        assert (answers["stopped"].text, answers["stopped"].finish_reason) == ("a ", "stop")
        assert answers["stopped"].tokens == tuple(map(ord, "a story"))
        assert answers["left"].finish_reason == "cancelled"
        assert not fake.draft.submitted

    with_deployment(scenario)


def test_a_worker_that_is_lost_while_others_are_restarted_is_restarted_next() -> None:
    async def scenario(fake: FakeDeployment) -> None:
        pieces = await some_pieces(fake.coordinator)
        first = fake.targets[0]
        # The next DraftWorker takes rank 0 along; the next rank 0 fails, while a DraftWorker that loads does not.
        fake.crew.prepare_next["draft"] = lambda draft: setattr(draft, "load", first.kill)
        fake.crew.prepare_next["target 0"] = lambda target: setattr(target, "death", "no such file")
        fake.draft.kill()
        await text_of(fake.coordinator, pieces)
        assert "".join(piece.text for piece in pieces) == STORY[:100]
        assert fake.crew.spawned == [*ALL, "draft", "target 0", "target 0"]

    with_deployment(scenario)


def test_a_deployment_that_cannot_come_back_ends_with_the_reason() -> None:
    cluster = ClusterConfig(max_restarts=2)

    def cannot_load(worker: FakeTarget) -> None:
        worker.death = "no such file"

    async def scenario(fake: FakeDeployment) -> None:
        await some_pieces(fake.coordinator)
        load = fake.crew.spawn

        def spawn(name: str) -> Any:
            fake.crew.prepare_next[name] = cannot_load
            return load(name)

        fake.crew.spawn = spawn  # type: ignore[method-assign]
        fake.draft.silent.set()
        fake.targets[1].kill()
        last = (await text_of(fake.coordinator, []))["a"]
        assert last.finish_reason == "error"
        assert last.error.startswith("target 1 failed during load: RuntimeError: no such file (")
        assert last.error.endswith("; given up after cluster.max_restarts = 2 in vain")
        with pytest.raises(EngineError, match="given up after"):
            await fake.coordinator.submit([])
        assert fake.crew.spawned == [*ALL, "target 1", "target 1"]

    with_deployment(scenario, replace(FAKE_CONFIG, cluster=cluster))


def test_on_gpus_a_broken_group_stays_nowhere_and_a_whole_one_does() -> None:
    cluster = ClusterConfig(num_gpus_per_target=1.0, num_gpus_per_draft=1.0)

    async def scenario(fake: FakeDeployment) -> None:
        pieces = await some_pieces(fake.coordinator)
        fake.draft.kill()
        while fake.crew.spawned != [*ALL, "draft"] or not fake.draft.submitted:
            await asyncio.sleep(0.001)
        fake.draft.silent.set()
        fake.targets[0].kill()
        await text_of(fake.coordinator, pieces)
        assert "".join(piece.text for piece in pieces) == STORY[:100]
        assert sorted(fake.crew.spawned[4:]) == ALL

    with_deployment(scenario, replace(FAKE_CONFIG, cluster=cluster))


@pytest.mark.parametrize("seed", range(3))
def test_sixteen_texts_are_right_whoever_is_harmed_and_when(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also who is not there yet, or there no longer."""
    chance = random.Random(seed)
    monkeypatch.setattr(health, "_AFTER_OTHERS_S", 0.3)
    monkeypatch.setattr(fake_workers, "ROUND_S", 0.02)
    monkeypatch.setattr(restarts, "_FIRST_PAUSE_S", 0.01)
    cluster = ClusterConfig(heartbeat_timeout_s=0.5, max_restarts=1000)

    async def scenario(fake: FakeDeployment) -> None:
        names = [str(number) for number in range(16)]
        texts = dict.fromkeys(names, "")

        async def read() -> None:
            await fake.coordinator.submit([ticket(name) for name in names])
            while len(texts) > len(ended):
                for name, piece in (await fake.coordinator.take(1.0)).answers:
                    assert isinstance(piece, Piece)
                    texts[name] += piece.text
                    ended.update({name} if piece.finish_reason == "length" else ())

        ended: set[str] = set()
        reading = asyncio.create_task(read())
        for _ in range(12):
            await asyncio.sleep(chance.choice([0.0, 0.01, 0.1, 0.4]))
            name = chance.choice(ALL)
            if name != "draft":
                fake.draft.silent.set()
            chance.choice([die, die, fail, hang])(fake.crew.workers[name])
        await reading
        assert set(texts.values()) == {STORY[:100]}

    with_deployment(scenario, replace(FAKE_CONFIG, cluster=cluster))


def test_restarts_in_vain_are_counted_and_wait_longer_and_longer() -> None:
    now = 0.0
    counted = Restarts(3, 60.0, lambda: now)
    assert [counted.begin() for _ in range(3)] == [0.0, 0.5, 1.0]
    assert not counted.is_allowed
    counted.note_tokens()
    assert [counted.begin() for _ in range(3)] == [0.0, 0.5, 1.0]
    now = 1000.0  # a start may take long
    counted.stands()
    counted.lost()
    assert not counted.is_allowed
    now = 1061.0  # it stood for a minute
    counted.lost()
    assert counted.begin() == 0.0
    assert counted.num == 7
    assert not Restarts(0, 60.0).is_allowed
