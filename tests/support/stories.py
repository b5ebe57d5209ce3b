"""Requests to a Coordinator on fake workers, each of which gets the same story, and what may become of a worker."""

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

from outrider.cluster.api import GenerationRequest, Piece, Ticket
from outrider.cluster.coordinator import Coordinator
from outrider.configs.schema import Config
from outrider.workers.answer import Completion
from support.char_admission import char_admission
from support.fake_workers import FAKE_CONFIG, FakeDeployment, fake_deployment

STORY = "a story of which every letter counts, " * 3
ASKED = GenerationRequest("x", {"max_tokens": 100, "logprobs": True})
ALL = ["draft", "target 0", "target 1"]


def story(prompt: str) -> str:
    return STORY


def ticket(name: str, asked: GenerationRequest = ASKED, whole: bool = False) -> Ticket:
    return Ticket(name, pickle.dumps(asked), whole)


async def text_of(coordinator: Coordinator, pieces: list[Piece], number: int = 1) -> dict[str, Any]:
    """Takes answers until so many have ended; pieces are collected, by name all of an answer is returned."""
    ended: dict[str, Any] = {}
    while len(ended) < number:
        for name, answer in (await coordinator.take(1.0)).answers:
            if isinstance(answer, Piece):
                pieces.append(answer)
            if isinstance(answer, Completion) or (isinstance(answer, Piece) and answer.finish_reason):
                ended[name] = answer
    return ended


def with_deployment(
    scenario: Callable[[FakeDeployment], Awaitable[None]], config: Config = FAKE_CONFIG
) -> None:
    async def run() -> None:
        async with asyncio.timeout(30.0), fake_deployment(story, config) as fake:
            await scenario(fake)

    asyncio.run(run())


async def some_pieces(coordinator: Coordinator) -> list[Piece]:
    """The first ones of a request named `a`, which goes on."""
    await coordinator.submit([ticket("a")])
    pieces: list[Piece] = []
    while len(pieces) < 3:
        pieces += [piece for _, piece in (await coordinator.take(1.0)).answers if isinstance(piece, Piece)]
    return pieces


def die(worker: Any) -> None:
    worker.kill()


def fail(worker: Any) -> None:
    worker.die("out of memory")


def hang(worker: Any) -> None:
    worker.hangs.set()


async def another_coordinator(fake: FakeDeployment, config: Config) -> FakeDeployment:
    """In place of one that is lost, which takes nothing with it."""
    for task in list(fake.coordinator._tasks):
        task.cancel()
    await asyncio.sleep(0)
    coordinator = Coordinator(config, fake.crew, char_admission)
    await coordinator.take_over(fake.crew.handles(), "measured", "the Coordinator died", 1)  # type: ignore[arg-type]
    return FakeDeployment(coordinator, fake.crew, [])
