"""The Coordinator: requests in, tokens out, and an eye on the workers. It is not in the token loop.

One asyncio event loop holds everything; calls to workers are awaited Ray calls, heavy work goes to threads. No
call of a client waits for a request: answers are fetched from a mailbox, by one call for all of them.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayError

from outrider.cluster.actor_process import ProgressBoard
from outrider.cluster.admission import Admission, prepare_admission
from outrider.cluster.api import Delivery, EngineError, Progress, Prompt, ServedModel, Ticket
from outrider.cluster.crew import Crew
from outrider.cluster.door import Door
from outrider.cluster.health import Break, WorkerLostError, answers_of, result_of
from outrider.cluster.mailbox import Mailbox
from outrider.cluster.orders import Orders
from outrider.cluster.request_table import RequestTable
from outrider.cluster.restarts import Restarts
from outrider.configs.schema import Config
from outrider.workers.sequences.sequence import Request, TokenEvent
from outrider.workers.weights.progress import Progress as Report

if TYPE_CHECKING:
    from outrider.workers.rounds.budget import Profiles

_EVENTS_TIMEOUT_S = 1.0  # how long one call waits for tokens
_RESUMED_AT_ONCE = 64  # requests in one call


class Coordinator:
    """Starts the workers, admits requests, hands out what they give; starts lost workers again, and lets every
    request go on from what was handed out.

    orders: for new workers.
    prepare: fetches the models and gives what is needed at the door.
    Methods raise ValueError for what the user can change, EngineError when a worker is gone.
    """

    def __init__(
        self,
        config: Config,
        orders: Orders,
        prepare: Callable[[Config, Report], Admission] = prepare_admission,
    ) -> None:
        self._config = config
        self._orders = orders
        self._prepare = prepare
        self._board = ProgressBoard("coordinator")
        self._mailbox = Mailbox()
        orders.attach(self._mailbox.wake)
        self._table = RequestTable(self._mailbox.put, self._cancel_later)
        self._restarts = Restarts(config.cluster.max_restarts, config.cluster.restart_window_s)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pumping: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[Admission] | None = None
        self._crew: Crew | None = None
        self._warnings: list[str] = []
        self._may_send = True  # the workers stand
        self._restarting = ""  # why no tokens come for now
        self._failure = ""
        self._server_url = ""
        self._stopping = False

    async def start(self, workers: Mapping[str, Any]) -> list[str]:
        """Brings up the workers, new ones by name, connects and times them. Afterwards requests are taken.

        Returns what the user should be told about the deployment.

        Raises EngineError, too, when nothing moves for `cluster.start_timeout_s`.
        """
        self._crew = crew = Crew(self._config, self._orders, self._board.read, workers)
        await crew.watch.through(self._bring_up(crew))
        self._spawn_task(self._door.serve())
        self._pumping = self._spawn_task(self._pump(crew))
        self._spawn_task(self._keep_up(crew))
        self._spawn_task(crew.prepare_stand_in())
        return self._warnings

    async def take_over(
        self, workers: Mapping[str, Any], measured: "Profiles", reason: str, num_restarts: int
    ) -> None:
        """Lets the workers of another Coordinator, which was lost for this reason, go on. Then requests are taken.

        measured: what that one said. num_restarts: so far, this one included. Raises ValueError and EngineError as
        `start`.
        """
        self._restarts.num = num_restarts
        self._crew = crew = Crew(self._config, self._orders, self._board.read, workers)
        self._may_send = False
        self._set_restarting(reason)
        broken = await crew.take_over(measured, reason)
        self._spawn_task(self._go_on(crew, broken))
        self._open_door(await self._prepared())
        self._spawn_task(self._door.serve())

    async def prepare(self) -> None:
        """Reads what is needed at the door, before it is wanted: for one that waits to take over."""
        await self._prepared()

    async def measured(self) -> "Profiles":
        """What rounds cost here, for another Coordinator."""
        return self._standing.measured

    async def give(self, workers: Mapping[str, Any]) -> None:
        """Workers that the client has created, as `take` said."""
        self._orders.give(workers)

    async def progress(self) -> list[Progress]:
        """The stages of the start so far, of all processes."""
        return self._board.read() if self._crew is None else self._crew.watch.stages()

    async def submit(self, tickets: Sequence[Ticket]) -> None:
        """Takes requests, in order; whatever becomes of them comes out of `take`."""
        if self._failure:
            raise EngineError(self._failure)
        for ticket in tickets:
            self._door.arrive(ticket)

    async def take(self, timeout_s: float) -> Delivery:
        """Answers to all requests since the last call; waits up to `timeout_s` for the first."""
        answers = await self._mailbox.take(timeout_s)
        wanted, num_restarts = self._orders.wanted(), self._restarts.num
        return Delivery(answers, self._failure, self._restarting, wanted, num_restarts)

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
        """Counters of every worker, by name, and of the Coordinator; of it alone while workers are started again."""
        own = {"num_open_requests": self._table.num_open, "num_restarts": self._restarts.num}
        stats = {}
        if not self._restarting:
            stats = await answers_of(self._standing.workers, "stats", "stats")
            stats |= await self._of_draft_ranks("stats")
        return {**stats, "coordinator": own}

    async def trace(self) -> dict[str, list[dict[str, Any]]]:
        """Chrome trace events of every worker, by name; empty lists unless `rounds.trace` is set."""
        workers = self._standing.workers
        calls = (result_of(name, "trace", worker.trace_events.remote()) for name, worker in workers.items())
        traces = dict(zip(workers, await asyncio.gather(*calls), strict=True))
        return traces | await self._of_draft_ranks("trace_events")

    async def stop(self) -> None:
        """Ends the workers' loops in order. Open requests end with an error."""
        self._stopping = True
        self._fail("the engine was closed")
        if self._crew is not None:
            await self._crew.stop()
        for task in self._tasks:
            task.cancel()

    @property
    def _standing(self) -> Crew:
        assert self._crew is not None, "`start` comes first"
        return self._crew

    async def _of_draft_ranks(self, method: str) -> dict[str, Any]:
        """What the drafter's further ranks answer, by name: nobody but the DraftWorker knows them."""
        if self._config.draft.tp_size == 1:
            return {}
        answers = self._standing.drafting.of_ranks.remote(method)
        said: dict[str, Any] = await result_of("draft", method, answers)
        return said

    async def _bring_up(self, crew: Crew) -> None:
        # Models are fetched once, here, before every rank of this node asks for the same files.
        admission = await crew.watch.step("coordinator", "preparing", self._prepared())
        self._open_door(admission)
        self._warnings = await crew.bring_up(admission.calibration())

    async def _prepared(self) -> Admission:
        if self._preparing is None:
            preparing = asyncio.to_thread(self._prepare, self._config, self._board.report)
            self._preparing = asyncio.create_task(preparing)
        return await self._preparing

    def _open_door(self, admission: Admission) -> None:
        self._admission = admission
        max_open = self._config.cluster.max_open_requests
        self._door = Door(admission, self._table, self._send, self._mailbox.put, max_open)

    async def _send(self, requests: Sequence[Request]) -> None:
        if not self._may_send:
            return  # all that are open go on when the workers are there again
        try:
            await self._standing.submit(requests)
        except WorkerLostError:
            return  # likewise; or `_keep_up` says that they do not

    async def _pump(self, crew: Crew) -> None:
        """Moves tokens from the DraftWorker to the open requests, until it is lost."""
        while True:
            try:
                events = await crew.next_events(_EVENTS_TIMEOUT_S)
            except RayActorError:
                return  # `_keep_up` sees to it
            for event in events:
                self._deliver(event)
            if events:
                self._restarts.note_tokens()

    def _deliver(self, event: TokenEvent) -> None:
        try:
            self._table.deliver(event)
        except Exception as error:
            # A fault of ours at this request's text; the others go on.
            self._table.fail(event.request_id, f"its text failed: {type(error).__name__}: {error}")
            self._cancel_later(event.request_id)

    async def _keep_up(self, crew: Crew) -> None:
        """Starts again what breaks; where that may not or cannot be, ends the deployment with the reason."""
        while not self._failure:
            broken = await crew.broken()
            if self._stopping:
                return
            self._may_send = False
            if self._pumping is not None:
                self._pumping.cancel()
            self._restarts.lost()
            await self._restart(crew, broken)

    async def _go_on(self, crew: Crew, broken: Break) -> None:
        await self._restart(crew, broken)
        await self._keep_up(crew)

    async def _restart(self, crew: Crew, broken: Break) -> None:
        """Until all workers stand, or the deployment has ended."""
        while not self._may_send:
            if broken.counts:
                if not self._restarts.is_allowed:
                    self._fail(self._restarts.last_words(broken.reason))
                    crew.abandon()
                    return
                self._set_restarting(broken.reason)
                await asyncio.sleep(self._restarts.begin())
            try:
                await crew.rebuild(broken)
                self._may_send = True
            except (EngineError, ValueError) as error:
                broken = crew.lost_in_rebuild(str(error))
        self._restarts.stands()
        self._set_restarting("")
        self._pumping = self._spawn_task(self._pump(crew))
        self._spawn_task(crew.prepare_stand_in())
        await self._resume()

    async def _resume(self) -> None:
        requests = self._table.resume()
        for begin in range(0, len(requests), _RESUMED_AT_ONCE):
            batch = requests[begin : begin + _RESUMED_AT_ONCE]
            await self._send(batch)
            for request in batch:
                self._table.note_sent(request.id)

    def _set_restarting(self, reason: str) -> None:
        self._restarting = reason
        self._mailbox.wake()

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._table.fail_all(self._failure)
        self._mailbox.wake()

    def _cancel_later(self, request_id: str) -> None:
        self._spawn_task(self._cancel(request_id))

    async def _cancel(self, request_id: str) -> None:
        try:
            await self._standing.drafting.cancel.remote(request_id)
        except RayError:
            return  # nothing of it runs any longer

    def _spawn_task(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # Without this task the deployment would only seem to live.
            self._fail(f"the Coordinator failed: {type(error).__name__}: {error}")
