"""The Coordinator: requests in, tokens out, and an eye on the workers. It is not in the token loop.

One asyncio event loop holds everything; calls to workers are awaited Ray calls, heavy work goes to threads. No
call of a client waits for a request: answers are fetched from a mailbox, by one call for all of them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError

from outrider.cluster.actors import ProgressBoard, Workers
from outrider.cluster.admission import Admission, prepare_admission
from outrider.cluster.api import Delivery, EngineError, Progress, Prompt, ServedModel, Ticket
from outrider.cluster.door import Door
from outrider.cluster.health import answers_of, blame, result_of
from outrider.cluster.mailbox import Mailbox
from outrider.cluster.request_table import RequestTable
from outrider.cluster.startup import StartWatch
from outrider.configs.schema import Config
from outrider.workers.sequences.sequence import Request, TokenEvent
from outrider.workers.weights.progress import Progress as Report

T = TypeVar("T")

_EVENTS_TIMEOUT_S = 1.0  # how long one call waits for tokens
_GRACE_S = 0.3  # a death takes others along; the notices of all are here after that
_STOP_TIMEOUT_S = 5.0


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
        self._mailbox = Mailbox()
        self._table = RequestTable(self._mailbox.put, self._cancel_later)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._start: StartWatch | None = None
        self._warnings: list[str] = []
        self._failure = ""
        self._server_url = ""
        self._stopping = False

    async def start(self) -> list[str]:
        """Brings up the workers, connects and times them. Afterwards requests are taken.

        Returns what the user should be told about the deployment.

        Raises EngineError, too, when nothing moves for `cluster.start_timeout_s`.
        """
        self._workers = self._spawn(self._config)
        limit_s = self._config.cluster.start_timeout_s
        self._start = StartWatch(self._workers.by_name(), self._board.read, limit_s)
        await self._start.through(self._bring_up(self._start))
        self._spawn_task(self._door.serve())
        self._spawn_task(self._pump())
        self._spawn_task(self._watch())
        return self._warnings

    async def progress(self) -> list[Progress]:
        """The stages of the start so far, of all processes."""
        return self._board.read() if self._start is None else self._start.stages()

    async def submit(self, tickets: Sequence[Ticket]) -> None:
        """Takes requests, in order; whatever becomes of them comes out of `take`."""
        if self._failure:
            raise EngineError(self._failure)
        for ticket in tickets:
            self._door.arrive(ticket)

    async def take(self, timeout_s: float) -> Delivery:
        """Answers to all requests since the last call; waits up to `timeout_s` for the first."""
        answers = await self._mailbox.take(timeout_s)
        return Delivery(answers, self._failure)

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """Ends requests early: their last answers say "cancelled". Unknown ids are ignored."""
        for request_id in request_ids:
            self._table.cancel(request_id)

    async def describe(self) -> ServedModel:
        """What there is to know of the target without looking into its weights."""
        return await asyncio.to_thread(self._admission.describe)

    async def tokenize(self, prompt: Prompt, template: Mapping[str, object]) -> tuple[int, ...]:
        """The tokens that a request with this prompt would begin with. Raises ValueError as such a request would."""
        return await asyncio.to_thread(self._admission.tokens, prompt, template)

    async def announce(self, url: str) -> None:
        """A server stands at `url`."""
        self._server_url = url

    async def server_url(self) -> str:
        """Of the server that stands; empty without one."""
        return self._server_url

    async def stats(self) -> dict[str, dict[str, Any]]:
        """Counters of every worker, by name, and of the Coordinator."""
        stats = await answers_of(self._workers.by_name(), "stats", "stats")
        return {**stats, "coordinator": {"num_open_requests": self._table.num_open}}

    async def trace(self) -> dict[str, list[dict[str, Any]]]:
        """Chrome trace events of every worker, by name; empty lists unless `rounds.trace` is set."""
        handles = self._workers.by_name()
        calls = (result_of(name, "trace", handle.trace_events.remote()) for name, handle in handles.items())
        return dict(zip(handles, await asyncio.gather(*calls), strict=True))

    async def stop(self) -> None:
        """Ends the workers' loops in order. Open requests end with an error."""
        self._stopping = True
        self._fail("the engine was closed")
        if self._runs:
            stopping = asyncio.ensure_future(self._workers.draft.stop.remote())
            await asyncio.wait((stopping,), timeout=_STOP_TIMEOUT_S)
            await asyncio.wait(self._runs.values(), timeout=_STOP_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()

    async def _bring_up(self, watch: StartWatch) -> None:
        # Models are fetched once, here, before every rank of this node asks for the same files.
        preparing = asyncio.to_thread(self._prepare, self._config, self._board.report)
        self._admission = admission = await watch.step("coordinator", "preparing", preparing)
        max_open = self._config.cluster.max_open_requests
        self._door = Door(admission, self._table, self._send, self._mailbox.put, max_open)
        targets, draft = self._workers.targets, self._workers.draft
        handles = self._workers.by_name()
        await asyncio.gather(*(watch.step(n, "load", h.load.remote()) for n, h in handles.items()))
        host, port = await watch.step("target 0", "start", targets[0].open_store.remote())
        connects = (watch.step(n, "connect", h.connect.remote(host, port, 0)) for n, h in handles.items())
        await asyncio.gather(*connects)
        for rank, target in enumerate(targets):
            self._run(f"target {rank}", target)
        await self._unless_one_dies(watch.step("draft", "profile", draft.profile.remote()))
        calibrating = draft.calibrate.remote(admission.calibration())
        self._warnings = await self._unless_one_dies(watch.step("draft", "calibrate", calibrating))
        self._run("draft", draft)

    def _run(self, name: str, handle: Any) -> None:
        self._runs[name] = asyncio.create_task(result_of(name, "run", handle.run.remote()))

    async def _unless_one_dies(self, step: Awaitable[T]) -> T:
        """The result of `step`, or the error of a worker whose loop ended meanwhile."""
        task = asyncio.ensure_future(step)
        await asyncio.wait((task, *self._runs.values()), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.exception() is not None:
            await asyncio.sleep(_GRACE_S)
            if any(run.done() for run in self._runs.values()):
                task.cancel()
                raise EngineError(await blame(self._runs, self._workers.by_name()))
        return await task

    async def _send(self, requests: list[Request]) -> None:
        await result_of("draft", "submit", self._workers.draft.submit.remote(requests))

    async def _pump(self) -> None:
        """Moves tokens from the DraftWorker to the open requests, for ever."""
        while True:
            try:
                events = await self._workers.draft.next_events.remote(_EVENTS_TIMEOUT_S)
            except RayActorError:
                return  # `_watch` says what happened
            for event in events:
                self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        try:
            self._table.deliver(event)
        except Exception as error:
            # A fault of ours at this request's text; the others go on.
            self._table.fail(event.request_id, f"its text failed: {type(error).__name__}: {error}")
            self._cancel_later(event.request_id)

    async def _watch(self) -> None:
        """The end of any worker's loop is the end of the deployment."""
        await asyncio.wait(self._runs.values(), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(_GRACE_S)
        if not self._stopping:
            self._fail(await blame(self._runs, self._workers.by_name()))
            self._end_survivors()

    def _end_survivors(self) -> None:
        """Ranks may wait on a GPU for one that is gone, where nothing inside them would end it."""
        for rank, target in enumerate(self._workers.targets):
            if not self._runs[f"target {rank}"].done():
                target.abort.remote()

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._table.fail_all(self._failure)
        self._mailbox.wake()

    def _cancel_later(self, request_id: str) -> None:
        self._spawn_task(self._cancel(request_id))

    async def _cancel(self, request_id: str) -> None:
        try:
            await self._workers.draft.cancel.remote(request_id)
        except RayError:
            return  # nothing of it runs any longer; `_watch` says what happened

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # Without this task the deployment would only seem to live.
            self._fail(f"the Coordinator failed: {type(error).__name__}: {error}")
