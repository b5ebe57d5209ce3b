"""Who is to blame, and starts that stand still: on fake workers."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from outrider.cluster import health, startup
from outrider.cluster.api import EngineError, Progress
from outrider.cluster.health import blame, result_of
from outrider.cluster.startup import StartWatch
from support.fake_workers import FakeTarget, LocalHandle

NAMES = ("draft", "target 0", "target 1")


class Silent(FakeTarget):
    """Stopped (SIGSTOP): it answers nothing until the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def progress(self) -> list[Any]:
        self.over.wait()
        return []


def with_handles(
    workers: dict[str, FakeTarget], scenario: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(16) as threads:
            try:
                await scenario({name: LocalHandle(worker, threads) for name, worker in workers.items()})
            finally:
                for worker in workers.values():
                    if isinstance(worker, Silent):
                        worker.over.set()

    asyncio.run(run())


async def failed(name: str, error: BaseException) -> None:
    async def call() -> None:
        raise error

    await result_of(name, "run", call())


LOST_PEER = ConnectionError("link: rank 0 gave up")


@pytest.mark.parametrize(
    ("errors", "silent", "expected"),
    [
        ({"target 1": LOST_PEER}, "draft", "draft did not answer for seconds"),
        ({"target 0": LOST_PEER, "draft": LOST_PEER}, "target 1", "target 1 did not answer for seconds"),
        (
            {"target 0": LOST_PEER, "draft": LOST_PEER, "target 1": RuntimeError("out of memory")},
            "",
            "target 1 failed during run: RuntimeError: out of memory",
        ),
        ({"target 0": LOST_PEER}, "", "target 0 failed during run: ConnectionError: link: rank 0 gave up"),
        ({"target 0": None}, "", "target 0 ended on its own"),
    ],
)
def test_the_cause_is_named_and_not_those_who_complain_of_it(
    errors: dict[str, Exception | None], silent: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_AFTER_OTHERS_S", 0.3)

    async def scenario(handles: dict[str, Any]) -> None:
        runs = {
            name: asyncio.ensure_future(failed(name, error) if error else asyncio.sleep(0))
            for name, error in errors.items()
        }
        await asyncio.wait(runs.values())
        assert (await blame(runs, handles)).reason.startswith(expected)

    with_handles({name: Silent() if name == silent else FakeTarget() for name in NAMES}, scenario)


def test_a_start_ends_when_a_process_is_silent_or_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_PERIOD_S", 0.01)

    async def silent(handles: dict[str, Any]) -> None:
        watch = StartWatch(handles, list, 0.3)
        with pytest.raises(EngineError, match=r"^draft did not answer for 0.3 s \(cluster.start_timeout_s\)"):
            await watch.through(watch.step("draft", "load", asyncio.sleep(60)))

    async def still(handles: dict[str, Any]) -> None:
        watch = StartWatch(handles, lambda: [Progress("coordinator", "download org/model", 0, 0)], 0.3)
        message = r"^the start stood still for 0.3 s .*: coordinator is at download org/model$"
        with pytest.raises(EngineError, match=message):
            await watch.through(watch.step("coordinator", "preparing", asyncio.sleep(60)))

    with_handles({"draft": Silent(), "target 0": FakeTarget()}, silent)
    with_handles({"target 0": FakeTarget()}, still)


def test_a_start_that_moves_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_PERIOD_S", 0.01)
    done = 0

    async def load(handles: dict[str, Any]) -> None:
        nonlocal done
        watch = StartWatch(handles, lambda: [Progress("coordinator", "load", done, 100)], 1.0)

        async def steps() -> None:
            nonlocal done
            while done < 30:
                await asyncio.sleep(0.05)
                done += 1

        await watch.through(steps())

    with_handles({"target 0": FakeTarget()}, load)
    assert done == 30
