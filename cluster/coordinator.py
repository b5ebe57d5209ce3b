"""The Coordinator: requests in, tokens out, and an eye on the workers. It is not in the token loop.

One asyncio event loop holds everything; calls to workers are awaited Ray calls, heavy work goes to threads.
"""

import asyncio
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from outrider.cluster.actors import ProgressBoard, Workers
from outrider.cluster.admission import Admission, prepare_admission
from outrider.cluster.api import (
    Completion,
    EngineError,
    GenerationRequest,
    Piece,
    Progress,
    failed_completion,
)
from outrider.cluster.request_table import OpenRequest, RequestTable, completion_of, pieces_of
from outrider.configs.schema import Config
from outrider.workers.weights.progress import Progress as Report

T = TypeVar("T")

_PLACE = re.compile(r'File "(.+)", line (\d+)')
_EVENTS_TIMEOUT_S = 1.0  # how long one call waits for tokens
_PROGRESS_PERIOD_S = 0.2
_GRACE_S = 0.3  # a death takes others along; the notices of all are here after that
_STOP_TIMEOUT_S = 5.0


class WorkerLostError(EngineError):
    """A worker's process is gone."""


class Coordinator:
    """Starts the workers, admits requests, hands out what they give.

    spawn: creates the workers; in tests it gives fakes with the same `.method.remote(...)` calls.
    prepare: fetches the models and gives what is needed at the door.
    Methods raise ValueError for what the user can change, EngineError when a worker is gone.
    """

    def __init__(
        self,
        config: Config,
        spawn: Callable[[Config], Workers],
        prepare: Callable[[Config, Report], Admission] = prepare_admission,
    ) -> None:
        self._config = config
        self._spawn = spawn
        self._prepare = prepare
        self._board = ProgressBoard("coordinator")
        self._progress: dict[str, list[Progress]] = {}
        self._table = RequestTable(self._cancel_later)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._failure = ""
        self._stopping = False

    async def start(self) -> None:
        """Brings up the workers, connects and times them. Afterwards requests are taken."""
        self._workers = self._spawn(self._config)
        poll = asyncio.create_task(self._poll_progress())
        try:
            # Models are fetched once, here, before every rank of this node asks for the same files.
            self._admission = await asyncio.to_thread(self._prepare, self._config, self._board.report)
            await self._bring_up()
        finally:
            poll.cancel()
        self._spawn_task(self._pump())
        self._spawn_task(self._watch())

    async def progress(self) -> list[Progress]:
        """The stages of the start so far, of all processes."""
        return [stage for stages in (self._board.read(), *self._progress.values()) for stage in stages]

    async def stream(self, request_id: str, asked: GenerationRequest) -> AsyncIterator[Piece]:
        """The answer piece by piece; the last piece has a finish reason."""
        entry = await self._submit(request_id, asked)
        async for piece in pieces_of(entry):
            yield piece

    async def complete(self, request_id: str, asked: GenerationRequest) -> Completion:
        """The whole answer; a refused request is an answer with finish reason "error"."""
        try:
            entry = await self._submit(request_id, asked)
        except ValueError as error:
            return failed_completion(str(error))
        return await completion_of(entry)

    async def cancel(self, request_id: str) -> None:
        """Ends a request early; its stream closes with finish reason "cancelled". Unknown ids are ignored."""
        await self._workers.draft.cancel.remote(request_id)

    async def failure(self) -> str:
        """Why the deployment is unusable; empty while it works."""
        return self._failure

    async def stats(self) -> dict[str, dict[str, Any]]:
        """Counters of every worker, by name, and of the Coordinator."""
        handles = self._workers.by_name()
        stats = await asyncio.gather(
            *(_result(name, "stats", h.stats.remote()) for name, h in handles.items())
        )
        own = {"num_open_requests": self._table.num_open}
        return {**dict(zip(handles, stats, strict=True)), "coordinator": own}

    async def trace(self) -> dict[str, list[dict[str, Any]]]:
        """Chrome trace events of every worker, by name; empty lists unless `rounds.trace` is set."""
        handles = self._workers.by_name()
        calls = (_result(name, "trace", handle.trace_events.remote()) for name, handle in handles.items())
        return dict(zip(handles, await asyncio.gather(*calls), strict=True))

    async def stop(self) -> None:
        """Ends the workers' loops in order. Open requests end with an error."""
        self._stopping = True
        self._fail("the engine was closed")
        if self._runs:
            await self._workers.draft.stop.remote()
            await asyncio.wait(self._runs.values(), timeout=_STOP_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()

    async def _bring_up(self) -> None:
        targets, draft = self._workers.targets, self._workers.draft
        handles = self._workers.by_name()
        await asyncio.gather(
            *(_result(name, "load", handle.load.remote()) for name, handle in handles.items())
        )
        host, port = await _result("target 0", "start", targets[0].open_store.remote())
        connects = (_result(n, "connect", h.connect.remote(host, port, 0)) for n, h in handles.items())
        await asyncio.gather(*connects)
        for rank, target in enumerate(targets):
            self._run(f"target {rank}", target)
        await self._unless_one_dies(_result("draft", "profile", draft.profile.remote()))
        self._run("draft", draft)

    def _run(self, name: str, handle: Any) -> None:
        self._runs[name] = asyncio.create_task(_result(name, "run", handle.run.remote()))

    async def _unless_one_dies(self, step: Awaitable[T]) -> T:
        """The result of `step`, or the error of a worker whose loop ended meanwhile."""
        task = asyncio.ensure_future(step)
        await asyncio.wait((task, *self._runs.values()), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.exception() is not None:
            await asyncio.sleep(_GRACE_S)
            if any(run.done() for run in self._runs.values()):
                task.cancel()
                raise EngineError(self._why())
        return await task

    async def _submit(self, request_id: str, asked: GenerationRequest) -> OpenRequest:
        if self._failure:
            raise EngineError(self._failure)
        # Tokenizing a long prompt takes milliseconds; the streams of others go on meanwhile.
        request = await asyncio.to_thread(self._admission.admit, request_id, asked)
        entry = self._table.open(request, self._admission.decoder())
        try:
            await _result("draft", "submit", self._workers.draft.submit.remote(request))
        except ValueError:
            self._table.forget(request_id)
            raise
        return entry

    async def _pump(self) -> None:
        """Moves tokens from the DraftWorker to the open requests, for ever."""
        while True:
            try:
                events = await self._workers.draft.next_events.remote(_EVENTS_TIMEOUT_S)
            except RayError:
                return  # `_watch` says what happened
            for event in events:
                self._table.deliver(event)

    async def _watch(self) -> None:
        """The end of any worker's loop is the end of the deployment."""
        await asyncio.wait(self._runs.values(), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(_GRACE_S)
        if not self._stopping:
            self._fail(self._why())
            self._end_survivors()

    def _end_survivors(self) -> None:
        """Ranks may wait on a GPU for one that is gone, where nothing inside them would end it."""
        for rank, target in enumerate(self._workers.targets):
            if not self._runs[f"target {rank}"].done():
                target.abort.remote()

    def _why(self) -> str:
        """The likeliest cause among the loops that ended: a lost process, else an error, else a silent end."""
        ended = [(name, run.exception()) for name, run in self._runs.items() if run.done()]
        errors = [error for _, error in ended if error is not None]
        if not errors:
            return f"{ended[0][0]} ended on its own"
        # A worker whose peer is gone complains too; the peer is the cause.
        return str(min(errors, key=lambda error: not isinstance(error, WorkerLostError)))

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._table.fail_all(self._failure)

    def _cancel_later(self, request_id: str) -> None:
        self._spawn_task(self.cancel(request_id))

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _poll_progress(self) -> None:
        async def poll(name: str, handle: Any) -> None:
            while True:
                try:
                    self._progress[name] = await handle.progress.remote()
                except RayError:
                    return  # the call that waits for the worker says what happened
                await asyncio.sleep(_PROGRESS_PERIOD_S)

        await asyncio.gather(*(poll(name, handle) for name, handle in self._workers.by_name().items()))


async def _result(name: str, doing: str, call: Awaitable[T]) -> T:
    """The result of a worker's call. ValueErrors pass; all else becomes an EngineError of one line."""
    try:
        return await call
    except RayActorError as error:
        raise WorkerLostError(f"{name} died during {doing}: its process is gone") from error
    except RayTaskError as error:
        raise _one_line(name, doing, error.cause, str(error)) from error
    except ValueError:
        raise
    except Exception as error:
        # Whatever ended the worker's call, its callers get to know.
        raise _one_line(name, doing, error, traceback.format_exc()) from error


def _one_line(name: str, doing: str, error: BaseException, trace: str) -> Exception:
    """`trace` is the traceback as text: the place of the error is all of it that goes into the message."""
    if isinstance(error, ValueError):
        return error
    lines = str(error).strip().splitlines() or ["no message"]
    places = _PLACE.findall(trace)
    place = f" ({Path(places[-1][0]).name}, line {places[-1][1]})" if places else ""
    return EngineError(f"{name} failed during {doing}: {type(error).__name__}: {lines[0]}{place}")
