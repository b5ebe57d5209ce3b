"""The Coordinator is lost: another one takes over the workers, which are fakes, and what the journal says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from outrider.cluster.actors import Standing
from outrider.cluster.api import GenerationRequest, Piece
from outrider.cluster.journal import Journal
from outrider.configs.schema import ClusterConfig
from outrider.workers.sequences.origin import Origin
from support.fake_workers import FAKE_CONFIG, FakeDeployment
from support.stories import (
    ALL,
    STORY,
    another_coordinator,
    die,
    hang,
    some_pieces,
    text_of,
    ticket,
    with_deployment,
)


def between_two(worker: Any) -> None:
    """In the middle of joining."""
    worker.where = Standing(-1)


def stands_in(worker: Any) -> None:
    worker.inner.where = worker.where


@pytest.mark.parametrize(
    ("name", "harm", "spawned", "met_again"),
    [
        ("draft", None, [], ("relink", 1)),
        ("draft", die, ["draft"], ("relink", 1)),
        ("draft", between_two, ["draft"], ("relink", 1)),
        ("target 1", die, ["target 1"], ("connect", 1)),
        ("target 1", hang, ["target 1"], ("connect", 1)),
        ("target 0", stands_in, ["draft", "target 0"], ("connect", 1)),
    ],
)
def test_another_coordinator_goes_on_with_the_workers_that_stand(
    name: str, harm: Callable[[Any], None] | None, spawned: list[str], met_again: tuple[str, int]
) -> None:
    config = replace(FAKE_CONFIG, cluster=ClusterConfig(heartbeat_timeout_s=0.5))

    async def scenario(fake: FakeDeployment) -> None:
        journal = Journal()
        stopped = ticket("stopped", GenerationRequest("x", {"max_tokens": 100, "stop": ["story"]}))
        journal.enter([ticket("a"), ticket("b", whole=True), stopped], coordinator=0)
        said = Piece(tokens=tuple(map(ord, "a story")), origins=(Origin.TARGET,) * 7)
        journal.note("stopped", said)  # all but its last piece
        pieces = await some_pieces(fake.coordinator)
        for piece in pieces:
            journal.note("a", piece)
        if harm is not None:
            harm(fake.crew.workers[name])
        other = await another_coordinator(fake, config)
        assert (await other.coordinator.take(0.0)).restarting in ("", "the Coordinator died")
        left = journal.left_by_others(1)
        assert [ticket.request_id for ticket in left] == ["a", "b", "stopped"]
        await other.coordinator.submit(left)
        ended = await text_of(other.coordinator, pieces, 3)
        assert "".join(piece.text for piece in pieces) == STORY[:100]
        assert sum(len(piece.tokens) for piece in pieces) == 100
        assert (ended["a"].finish_reason, ended["a"].stats.num_rounds) == ("length", 34)
        assert ended["b"].text == STORY[:100]
        assert (ended["stopped"].finish_reason, ended["stopped"].text) == ("stop", "")
        assert sorted(fake.crew.spawned[3:]) == spawned
        for survivor in set(ALL) - {"draft", *spawned}:
            worker = fake.crew.workers[survivor]
            assert met_again in worker.calls
            assert worker.calls.count(("load",)) == 1
        assert journal.left_by_others(1) == []
        assert (await other.coordinator.take(0.0)).num_restarts == 1

    with_deployment(scenario, config)


def test_on_gpus_a_whole_group_stays_with_another_coordinator() -> None:
    config = replace(FAKE_CONFIG, cluster=ClusterConfig(num_gpus_per_target=1.0, num_gpus_per_draft=1.0))

    async def scenario(fake: FakeDeployment) -> None:
        other = await another_coordinator(fake, config)
        await other.coordinator.submit([ticket("a")])
        await text_of(other.coordinator, [])
        assert fake.crew.spawned == ALL
        assert all(("relink", 1) in target.calls for target in fake.targets)

    with_deployment(scenario, config)


def test_where_nobody_had_joined_another_coordinator_starts_all() -> None:
    async def scenario(fake: FakeDeployment) -> None:
        for name in ALL:
            between_two(fake.crew.workers[name])
        other = await another_coordinator(fake, FAKE_CONFIG)
        await other.coordinator.submit([ticket("a")])
        await text_of(other.coordinator, [])
        assert sorted(fake.crew.spawned[3:]) == ALL

    with_deployment(scenario)
