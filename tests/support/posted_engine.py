"""An Engine whose Coordinator runs in a thread of this process, on workers without models."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from outrider.cluster.api import GenerationRequest, Prompt, ServedModel
from outrider.cluster.inbox import Box, Call, Inbox
from outrider.configs.schema import Config
from support.fake_workers import FAKE_CONFIG, FakeDeployment, fake_deployment

LIMIT_S = 20.0


class PostedEngine:
    """What a server needs of an Engine. The calls of the Coordinator and the Inbox are the real ones."""

    def __init__(self, fake: FakeDeployment, loop: asyncio.AbstractEventLoop) -> None:
        self.fake = fake
        self.posted: list[GenerationRequest] = []
        self._loop = loop
        self.inbox = Inbox(self._call, self)

    @property
    def failure(self) -> str:
        return self.inbox.failure

    @property
    def restarting(self) -> str:
        return self.inbox.restarting

    def post(self, asked: GenerationRequest, box: Box) -> str:
        self.posted.append(asked)
        return self.inbox.post(asked, box)

    def finish(self, request_id: str) -> None:
        self.inbox.finish(request_id)

    def drop(self, request_ids: list[str]) -> None:
        self.inbox.drop(request_ids)

    def describe(self) -> ServedModel:
        return self._call("describe")

    def tokenize(self, prompt: Prompt, template: dict[str, object]) -> tuple[int, ...]:
        return self._call("tokenize", prompt, template)

    def close(self) -> None:
        """`posted_engine` ends it."""

    def complaint(self) -> str:
        return ""

    def successor(self, reason: str, answered: bool, num_restarts: int) -> Call:
        raise AssertionError(reason)

    def provide(self, names: Sequence[str]) -> dict[str, Any]:
        raise AssertionError(names)

    def stats(self) -> dict[str, dict[str, Any]]:
        own = {"coordinator": {"num_open_requests": 3, "num_restarts": 2}}
        if self.restarting:
            return own
        draft = {"num_running": 1, "num_pages": 10, "num_available_pages": 4}
        return {"draft": {**draft, "busy_s": {"forward": 1.0}}, **own}

    def _call(self, method: str, *args: object) -> Any:
        coordinator = self.fake.coordinator
        return asyncio.run_coroutine_threadsafe(getattr(coordinator, method)(*args), self._loop).result(
            LIMIT_S
        )


@contextmanager
def posted_engine(answer: Callable[[str], str], config: Config = FAKE_CONFIG) -> Iterator[PostedEngine]:
    """Brings one up in an event loop of its own, and down again."""
    ready, over, engines = threading.Event(), threading.Event(), []

    async def live() -> None:
        async with fake_deployment(answer, config) as fake:
            engines.append(PostedEngine(fake, asyncio.get_running_loop()))
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(live(),), daemon=True)
    thread.start()
    assert ready.wait(LIMIT_S)
    try:
        yield engines[0]
    finally:
        engines[0].inbox.close("over")
        over.set()
        thread.join(LIMIT_S)
