"""The workers of a deployment: brought up together, watched, and joined again where some were lost.

Which process does what after a loss:

- A worker that died, fell silent or failed gets a new process, which loads its weights.
- Ranks whose group is whole (they lost their DraftWorker) get a link to the next one and stay as they are.
- Others keep their weights and join a new group. On GPUs they do not, for nothing is known of what a broken NCCL
  leaves behind: they get new processes, too.
- As long as the DraftWorker loads, a stand-in in rank 0's process drives the loop: texts go on, plainly decoded. When
  it has loaded, all join once more.

Every joining has a number, the epoch: what belongs to an earlier one is not listened to.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ray.exceptions import RayError

from outrider.cluster.actors import Standing, worker_names
from outrider.cluster.api import EngineError, Progress
from outrider.cluster.health import Break, LinkComplaintError, blame, result_of, silence
from outrider.cluster.stand_in import StandInHandle
from outrider.cluster.startup import StartWatch
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.workers.rounds.budget import Profiles
    from outrider.workers.sequences.sequence import Request, TokenEvent

T = TypeVar("T")

_GRACE_S = 0.3  # a death takes others along; the notices of all are here after that
_END_S = 5.0  # for a loop that was told of a loss; one that computes ends it with its round
_QUIET_S = 5.0  # after a start, in which first requests want the machine
_STOP_TIMEOUT_S = 5.0
_DRAFT = "draft"
BACK = Break("the DraftWorker is there again", frozenset(), counts=False)


class Spawner(Protocol):
    """Creates and ends workers; in tests those are fakes with the same `.method.remote(...)`."""

    async def spawn(self, name: str) -> Any:
        """A new process for a worker, one of `worker_names`."""

    def kill(self, worker: Any) -> None:
        """Ends its process, whatever it does."""


class Crew:
    """All workers by name, their loops, and how far a start of them is. Belongs to one event loop."""

    def __init__(
        self,
        config: Config,
        spawner: Spawner,
        own_stages: Callable[[], list[Progress]],
        workers: Mapping[str, Any],
    ) -> None:
        """own_stages: of the process that this belongs to.
        workers: by name, new ones for `bring_up`, another Coordinator's for `take_over`."""
        self._config = config
        self._spawner = spawner
        self._own_stages = own_stages
        self._targets = worker_names(config)[1:]
        self._workers = dict(workers)
        self.watch = self._new_watch(self._workers)
        self.epoch = 0
        self.drafting = self._workers[_DRAFT]  # who drives the loop: the DraftWorker or its stand-in
        self._loading: asyncio.Task[None] | None = None  # a DraftWorker that is not there yet
        self._address = ("", 0)  # of the store where all meet
        self._group_stands = False
        self._runs: dict[str, asyncio.Task[None]] = {}
        self.measured: Profiles  # what rounds cost
        self._unsure: set[str] = set()  # those that a joining has left in the middle of something

    @property
    def workers(self) -> dict[str, Any]:
        """Whoever works now, by name; a stand-in goes by the name of the DraftWorker."""
        return {**self._workers, _DRAFT: self.drafting}

    async def bring_up(self, calibration: "Request") -> list[str]:
        """The first start; returns what users should be told. Raises EngineError and ValueError."""
        loaded = await self._all(
            "load", {name: worker.load.remote() for name, worker in self._workers.items()}
        )
        # Ranks say the same, the DraftWorker nothing.
        told = dict.fromkeys(text for of_worker in loaded for text in of_worker or ())
        await self._connect()
        for name in self._targets:
            self._run(name)
        step, draft = self.watch.step, self._workers[_DRAFT]
        self.measured = await self._unless_one_dies(step(_DRAFT, "profile", draft.profile.remote()))
        calibrating = step(_DRAFT, "calibrate", draft.calibrate.remote(calibration))
        warnings: list[str] = await self._unless_one_dies(calibrating)
        self._run(_DRAFT)
        return [*told, *warnings]

    async def take_over(self, measured: "Profiles", reason: str) -> Break:
        """Another Coordinator had these workers, and was lost for this reason: what `rebuild` has to do.

        Whoever is not where the latest joining was is lost, too, or was in the middle of it. Where a stand-in worked
        it goes with rank 0: nobody here knows how far it was.
        """
        self.measured = measured
        standings = await self._standings()
        self.epoch = epoch = max((standing.epoch for standing in standings.values()), default=-1)
        here = {name: standing for name, standing in standings.items() if standing.epoch == epoch}
        lost = set(self._workers) - set(here)
        rank_0 = self._targets[0]
        if rank_0 in here and here[rank_0].stand_in_epoch == epoch:
            lost |= {rank_0, _DRAFT}
        if epoch < 0:
            lost = set(self._workers)
        if not lost.intersection(self._targets):
            self._address = (here[rank_0].host, here[rank_0].port)
            self._group_stands = True
        for name in set(self._workers) - lost:
            self._follow(name, self._workers[name].rest.remote())
        return Break(reason, frozenset(lost), counts=False)

    async def broken(self) -> Break:
        """Waits until all have to join again: a loop has ended, a worker does not answer any longer, or a DraftWorker
        has loaded."""
        timeout_s = self._config.cluster.heartbeat_timeout_s
        listening = asyncio.create_task(silence(self._present(), timeout_s))
        loading = () if self._loading is None else (self._loading,)
        try:
            await asyncio.wait(
                (listening, *loading, *self._runs.values()), return_when=asyncio.FIRST_COMPLETED
            )
            if any(task.done() and not _failed(task) for task in loading) and not self._has_ended():
                return BACK
            await asyncio.sleep(_GRACE_S)
            if listening.done():
                return listening.result()
        finally:
            listening.cancel()
        if self._has_ended() or self._loading is None:
            return self._lost(await blame(self._runs, self._present()))
        return Break(str(self._loading.exception()), frozenset((_DRAFT,)))

    async def rebuild(self, broken: Break) -> None:
        """Lets all go on together. Raises EngineError and ValueError; then `lost_in_rebuild` says who is to blame."""
        lost = await self._parted(broken.lost)
        for name in lost - {_DRAFT}:
            self._workers[name] = await self._spawner.spawn(name)
        if _DRAFT in lost:
            await self._begin_draft()
        self._unsure.clear()
        self.watch = self._new_watch(self._present())
        await self.watch.through(self._join(lost - {_DRAFT}))

    async def prepare_stand_in(self) -> None:
        """Loads it before it is wanted, once there is time: what it imports takes a second of a processor."""
        await asyncio.sleep(_QUIET_S)
        with suppress(RayError):  # `broken` sees to a rank that is lost
            await StandInHandle(self._workers[self._targets[0]]).load.remote()

    def lost_in_rebuild(self, reason: str) -> Break:
        """After a `rebuild` that failed."""
        return self._lost(Break(reason, frozenset(self._unsure)))

    async def submit(self, requests: Sequence["Request"]) -> None:
        """Gives requests to the DraftWorker, in order."""
        await result_of(_DRAFT, "submit", self.drafting.submit.remote(self.epoch, list(requests)))

    async def next_events(self, timeout_s: float) -> "list[TokenEvent]":
        """What has come out of the DraftWorker since the last call; waits up to `timeout_s` for the first."""
        events: list[TokenEvent] = await self.drafting.next_events.remote(self.epoch, timeout_s)
        return events

    def abandon(self) -> None:
        """There is no further start. Ranks may wait on a GPU for one that is gone, where nothing inside them would
        end it."""
        for name in self._targets:
            if self._is_running(name):
                self._workers[name].abort.remote()

    async def stop(self) -> None:
        """Ends all loops in order."""
        if self._loading is not None:
            self._loading.cancel()
        if self._runs:
            stopping = asyncio.ensure_future(self.drafting.stop.remote())
            await asyncio.wait((stopping,), timeout=_STOP_TIMEOUT_S)
            await asyncio.wait(self._runs.values(), timeout=_STOP_TIMEOUT_S)

    def _new_watch(self, workers: Mapping[str, Any]) -> StartWatch:
        return StartWatch(workers, self._own_stages, self._config.cluster.start_timeout_s)

    def _present(self) -> dict[str, Any]:
        """The processes that stand, without a DraftWorker that loads."""
        return {name: w for name, w in self._workers.items() if name != _DRAFT or self._loading is None}

    async def _standings(self) -> dict[str, Standing]:
        """Of the workers that answer, by name."""
        timeout_s = self._config.cluster.heartbeat_timeout_s
        calls = {
            name: asyncio.ensure_future(result_of(name, "standing", worker.standing.remote()))
            for name, worker in self._workers.items()
        }
        await asyncio.wait(calls.values(), timeout=timeout_s)
        answered = {name: call for name, call in calls.items() if call.done() and not _failed(call)}
        for call in calls.values():
            call.cancel()
        return {name: call.result() for name, call in answered.items()}

    async def _begin_draft(self) -> None:
        """A DraftWorker that nobody waits for: a stand-in works until it has loaded."""
        self._workers[_DRAFT] = self.drafting = await self._spawner.spawn(_DRAFT)
        self._loading = asyncio.create_task(self._load_draft(self.drafting))

    async def _load_draft(self, draft: Any) -> None:
        watch = StartWatch({_DRAFT: draft}, list, self._config.cluster.start_timeout_s)
        await watch.through(watch.step(_DRAFT, "load", draft.load.remote()))

    def _lost(self, broken: Break) -> Break:
        """A stand-in is lost with the process that it is in."""
        is_in_rank_0 = self.drafting is not self._workers[_DRAFT] and _DRAFT in broken.lost
        return Break(broken.reason, broken.lost - {_DRAFT} | {self._targets[0]}) if is_in_rank_0 else broken

    async def _parted(self, lost: Collection[str]) -> set[str]:
        """Ends the loops that still run, and the processes that cannot stay; returns whose these were."""
        gone = self._kill(
            set(lost)
        )  # before the others are waited for: they may wait for one that is stopped
        if gone.isdisjoint(self._targets):
            # Ranks that lose their DraftWorker pause on their own, after the round under way.
            if self._is_running(_DRAFT):
                self.drafting.abort.remote()
            await self._end(self._targets)
        whole = gone.isdisjoint(self._targets) and all(map(self._has_paused, self._targets))
        self._group_stands = self._group_stands and whole
        cluster, stands_in = self._config.cluster, self.drafting is not self._workers[_DRAFT]
        if not self._group_stands and cluster.num_gpus_per_target:
            gone |= self._kill(set(self._targets) - gone)
        if not self._group_stands and cluster.num_gpus_per_draft and not stands_in:
            gone |= self._kill({_DRAFT} - gone)
        told = [name for name in self._runs if name not in gone and self._is_running(name)]
        for name in told:
            self.workers[name].abort.remote()
        await self._end(told)
        deaf = {self._targets[0] if stands_in and n == _DRAFT else n for n in told if self._is_running(n)}
        if not deaf.isdisjoint(self._targets):
            self._group_stands = False
        return gone | self._kill(deaf - gone)

    def _kill(self, names: set[str]) -> set[str]:
        for name in names:
            if name == _DRAFT and self._loading is not None:
                self._loading.cancel()
            self._spawner.kill(self._workers[name])
        return names

    async def _end(self, names: Collection[str]) -> None:
        runs = [self._runs[name] for name in names if self._is_running(name)]
        if runs:
            await asyncio.wait(runs, timeout=_END_S)

    def _is_running(self, name: str) -> bool:
        return name in self._runs and not self._runs[name].done()

    def _has_ended(self) -> bool:
        return any(run.done() for run in self._runs.values())

    def _has_paused(self, name: str) -> bool:
        """Whether a rank waits for the next link: its loop ended for want of one, or has not begun."""
        run = self._runs.get(name)
        return run is None or (run.done() and isinstance(run.exception(), LinkComplaintError | None))

    async def _join(self, fresh: Collection[str]) -> None:
        await self._load(fresh)
        self.drafting = self._workers[_DRAFT]
        if self._loading is not None and self._loading.done():
            if _failed(self._loading):
                self._kill({_DRAFT})
                await self._begin_draft()
            else:
                self._loading = None
        if self._loading is not None:
            self.drafting = StandInHandle(self._workers[self._targets[0]])
            await self._all("load", {_DRAFT: self.drafting.load.remote()})
        await self._all_answer()
        self._runs.clear()
        self.epoch += 1
        if self._group_stands:
            relinks = {name: self._workers[name].relink.remote(self.epoch) for name in self._targets}
            connect = self.drafting.connect.remote(*self._address, self.epoch)
            await self._all("connect", {**relinks, _DRAFT: connect})
        else:
            await self._connect()
        for name in self._targets:
            self._run(name)
        await self._all("take over", {_DRAFT: self.drafting.take_over.remote(self.measured)})
        self._run(_DRAFT)

    async def _load(self, names: Collection[str]) -> None:
        """To the end of all, also where one fails: the others need not do it again."""
        self._unsure = set(names)
        steps = {
            name: asyncio.ensure_future(self.watch.step(name, "load", self._workers[name].load.remote()))
            for name in names
        }
        try:
            if steps:
                await asyncio.wait(steps.values())
            self._unsure = {name for name, step in steps.items() if _failed(step)}
            for step in steps.values():
                step.result()
        finally:
            for step in steps.values():
                step.cancel()

    async def _all_answer(self) -> None:
        """Whoever is gone or hangs by now is named, before the others wait for it."""
        timeout_s = self._config.cluster.heartbeat_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._all("start", {name: w.progress.remote() for name, w in self._present().items()})
        except TimeoutError as error:
            raise EngineError(f"{' and '.join(self._unsure)} did not answer for {timeout_s:g} s") from error

    async def _connect(self) -> None:
        opening = self._workers[self._targets[0]].open_store.remote()
        self._address = (await self._all("start", {self._targets[0]: opening}))[0]
        calls = {name: w.connect.remote(*self._address, self.epoch) for name, w in self.workers.items()}
        await self._all("connect", calls)
        self._group_stands = True

    async def _all(self, doing: str, calls: dict[str, Any]) -> list[Any]:
        """The results of calls of workers, or the first error of one; who has not answered then cannot stay."""
        steps = {
            name: asyncio.ensure_future(self.watch.step(name, doing, call)) for name, call in calls.items()
        }
        try:
            return await asyncio.gather(*steps.values())
        except BaseException:
            await asyncio.wait(steps.values(), timeout=_GRACE_S)
            self._unsure = {name for name, step in steps.items() if not step.done() or _failed(step)}
            for step in steps.values():
                step.cancel()
            raise

    def _run(self, name: str) -> None:
        self._follow(name, self.workers[name].run.remote())

    def _follow(self, name: str, loop: Awaitable[None]) -> None:
        run = asyncio.create_task(result_of(name, "run", loop))
        run.add_done_callback(_failed)  # not all are asked why they ended
        self._runs[name] = run

    async def _unless_one_dies(self, step: Awaitable[T]) -> T:
        """The result of `step`, or the error of a worker whose loop ended meanwhile."""
        task = asyncio.ensure_future(step)
        await asyncio.wait((task, *self._runs.values()), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.exception() is not None:
            await asyncio.sleep(_GRACE_S)
            if any(run.done() for run in self._runs.values()):
                task.cancel()
                raise EngineError((await blame(self._runs, self._workers)).reason)
        return await task


def _failed(step: "asyncio.Future[Any]") -> bool:
    return step.cancelled() or step.exception() is not None
