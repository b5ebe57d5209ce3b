"""Pieces from the engine, for an event loop: of all choices of one request, as they come."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from outrider.cluster.api import Answer, EngineError, GenerationRequest, Piece, Refusal
from outrider.cluster.serving.errors import ApiError

if TYPE_CHECKING:
    from outrider.cluster.engine import Engine

_Said = tuple[int, Answer | EngineError]


class _Box:
    """Carries the answers to one choice over from the engine's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, said: "asyncio.Queue[_Said]", index: int) -> None:
        self._loop = loop
        self._said = said
        self._index = index

    def put(self, answer: Answer | EngineError, /) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited with it
            self._loop.call_soon_threadsafe(self._said.put_nowait, (self._index, answer))


class Answers:
    """Runs some requests at once; iterating gives (index, piece). Belongs to one event loop, and must be closed.

    Raises ValueError for a request that cannot be run, OverloadedError for one that cannot be run now, ApiError
    for one that failed, EngineError when the engine is gone.
    """

    def __init__(self, engine: "Engine", requests: Sequence[GenerationRequest]) -> None:
        self._engine = engine
        self._said: asyncio.Queue[_Said] = asyncio.Queue()
        self._open: dict[int, str] = {}
        loop = asyncio.get_running_loop()
        try:
            for index, asked in enumerate(requests):
                self._open[index] = engine.post(asked, _Box(loop, self._said, index))
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if not self._open:
            raise StopAsyncIteration
        index, answer = await self._said.get()
        if isinstance(answer, Refusal):
            raise answer.raised()
        if isinstance(answer, EngineError):
            raise answer
        assert isinstance(answer, Piece), answer
        if answer.finish_reason:
            self._engine.finish(self._open.pop(index))
        if answer.finish_reason not in ("", "stop", "length"):
            reason = answer.error or f"the request was {answer.finish_reason}"
            raise (
                EngineError(reason) if self._engine.failure else ApiError(500, reason, code="request_failed")
            )
        return index, answer

    def close(self) -> None:
        """Cancels what has not ended."""
        self._engine.drop(list(self._open.values()))
        self._open.clear()
