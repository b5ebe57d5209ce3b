"""Answers as HTTP responses: whole, or a stream of server-sent events. A client that leaves ends its request."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from outrider.cluster.api import EngineError, Piece
from outrider.cluster.serving.answers import Answers
from outrider.cluster.serving.errors import ApiError, of_engine
from outrider.cluster.serving.gate import Receive, Scope, Send, visit_of
from outrider.cluster.serving.jobs import Job
from outrider.cluster.serving.limits import Places
from outrider.cluster.serving.metrics import AnswerTimes, ServerMetrics
from outrider.cluster.serving.usage import Tally
from outrider.cluster.serving.whole import whole_answer
from outrider.cluster.serving.writers import Sent, Writer

if TYPE_CHECKING:
    from outrider.cluster.engine import Engine

_LAST_WORDS_S = 2.0
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class AnswerResponse(Response):
    """Runs a job while the client is there, and writes what comes of it.

    Until the first piece has come an error is an HTTP error; afterwards it is the stream's last event.
    """

    def __init__(
        self,
        job: Job,
        writer: Writer,
        engine: "Engine",
        places: Places,
        metrics: ServerMetrics,
        max_request_s: float,
    ) -> None:
        super().__init__()
        self._job = job
        self._writer = writer
        self._engine = engine
        self._places = places
        self._metrics = metrics
        self._max_request_s = max_request_s
        self._tally = Tally(job)
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = visit_of(scope)
        write = self._write_events if self._job.stream else self._write_whole
        try:
            async with asyncio.timeout_at(visit.limit_s(self._max_request_s)):
                await while_there(receive, self._run(write, send))
        except TimeoutError:
            message = f"the answer took longer than {self._max_request_s:g} s (server.max_request_s)"
            await self._fail(ApiError(408, message, code="timeout"), send)
        except (ValueError, EngineError) as error:
            await self._fail(of_engine(error, self._job.prompt_field, self._job.format_field), send)
        except ApiError as error:
            await self._fail(error, send)
        finally:
            visit.noted |= {
                "prompt_tokens": self._tally.num_prompt_tokens,
                "completion_tokens": self._tally.num_tokens,
                **self._tally.speculation(),
            }
            if self._job.user:
                visit.noted["user"] = self._job.user[:200]

    async def _run(self, write: Callable[[Answers, AnswerTimes, Send], Awaitable[None]], send: Send) -> None:
        requests = self._job.requests
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._places.taken(len(requests)))
            times = stack.enter_context(contextlib.closing(AnswerTimes(self._metrics, len(requests))))
            answers = stack.enter_context(contextlib.closing(Answers(self._engine, requests)))
            await write(answers, times, send)

    async def _write_whole(self, answers: Answers, times: AnswerTimes, send: Send) -> None:
        body = await whole_answer(answers, self._job, self._writer, self._tally, partial(self._note, times))
        content = _json(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _write_events(self, answers: Answers, times: AnswerTimes, send: Send) -> None:
        async for index, piece in answers:
            self._note(times, index, piece)
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS]})
            for event in self._writer.events(index, piece, self._tally):
                await _send_event(event, send)
        for event in self._writer.ending(self._tally):
            await _send_event(event, send)
        await self._end_events(send)

    async def _end_events(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._writer.done, "more_body": False})

    def _note(self, times: AnswerTimes, index: int, piece: Piece) -> None:
        times.add(index, piece)
        self._tally.add(index, piece)

    async def _fail(self, error: ApiError, send: Send) -> None:
        if not self._started:
            raise error
        # A client that does not read holds up whoever writes to it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await _send_event(self._writer.failed(error), send)
                await self._end_events(send)


class _GoneError(Exception):
    """The client has left."""


async def while_there(receive: Receive, work: Awaitable[None]) -> None:
    """Runs `work` to its end, or until the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise _GoneError

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _send_event(event: Sent, send: Send) -> None:
    name, said = event
    head = f"event: {name}\n".encode() if name else b""
    body = head + b"data: " + _json(said) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _json(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # JSON takes these as they are; clients that cut a stream with `splitlines` would part it there.
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()
