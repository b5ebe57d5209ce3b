"""Workers without models: the calls of the actors in `outrider.cluster.actors`, answers from a script."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import ActorDiedError

from outrider.cluster.actors import Standing, worker_names
from outrider.cluster.coordinator import Coordinator
from outrider.cluster.orders import Orders
from outrider.configs.schema import Config, SamplingConfig, TargetConfig, TreeConfig
from outrider.workers.link.lost import LinkLostError
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import (
    NO_TREE,
    Request,
    RequestStats,
    RoundTree,
    TokenEvent,
    TokenLogprobs,
)
from support.char_admission import char_admission

FAKE_CONFIG = Config(
    target=TargetConfig(model="random:fake", tp_size=2, max_context=200),
    tree=TreeConfig(max_nodes=16, max_depth=8),
    sampling=SamplingConfig(max_tokens=50),
)
ROUND_S = 0.002


class FakeTarget:
    """A rank that waits until it is told to stop."""

    def __init__(self) -> None:
        self.death = ""
        self.was_aborted = False
        self.was_killed = False
        self.calls: list[tuple[object, ...]] = []
        self.hangs = threading.Event()
        self.where = Standing(-1)
        self._stop = threading.Event()
        self._runs = threading.Lock()
        self._error: BaseException | None = None

    def abort(self) -> None:
        self.was_aborted = True
        self.die_of(ConnectionError("told of a loss"))

    def load(self) -> list[str]:
        self.calls.append(("load",))
        if self.death:
            raise RuntimeError(self.death)
        return ["this target is slow"]

    def open_store(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def connect(self, host: str, port: int, epoch: int) -> None:
        self.calls.append(("connect", epoch))
        self.where = Standing(epoch, host, port)

    def relink(self, epoch: int) -> None:
        self.calls.append(("relink", epoch))
        self.where = replace(self.where, epoch=epoch)

    def standing(self) -> Standing:
        self.progress()  # which hangs where it does
        return self.where

    def run(self) -> None:
        with self._runs:
            self._stop.clear()
            self._error = None
            self.serve()
            if self._error is not None:
                raise self._error

    def rest(self) -> None:
        with self._runs:
            if self._error is not None:
                raise self._error

    def serve(self) -> None:
        self._stop.wait()

    def progress(self) -> list[Any]:
        while self.hangs.is_set() and not self.was_killed:
            time.sleep(0.01)
        return []

    def stats(self) -> dict[str, Any]:
        return {"busy_s": {"forward": 1.0, "wait": 1.0}}

    def trace_events(self) -> list[dict[str, Any]]:
        return [{"name": "forward", "ph": "X", "ts": 0.0, "dur": 1.0, "args": {}}]

    def stop(self) -> None:
        self._stop.set()

    def die(self, reason: str) -> None:
        """Its loop fails, its process stays."""
        self.death = reason
        self.die_of(RuntimeError(reason))

    def die_of(self, error: BaseException) -> None:
        if not self._stop.is_set():
            self._error = error
            self._stop.set()

    def kill(self) -> None:
        """Its process ends."""
        self.was_killed = True
        self.die_of(ActorDiedError())


class FakeRank0(FakeTarget):
    """Has a stand-in for the DraftWorker inside."""

    def __init__(self, crew: "FakeCrew") -> None:
        super().__init__()
        self.inner = FakeDraft(crew)

    def standing(self) -> Standing:
        return replace(self.where, stand_in_epoch=self.inner.where.epoch)

    def stand_in(self, method: str, *arguments: object) -> Any:
        return getattr(self.inner, method)(*arguments)

    def kill(self) -> None:
        super().kill()
        self.inner.kill()


class FakeDraft(FakeTarget):
    """Gives each request the text that `answer(prompt)` says, three tokens a round, the first two "drafted"; a
    lossy rule kept the second. Their tree offered another token after the second."""

    def __init__(self, crew: "FakeCrew") -> None:
        super().__init__()
        self.crew = crew
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.silent = threading.Event()  # no rounds until it is connected again, as where a rank is lost
        self._left: dict[str, list[int]] = {}
        self._emitted: dict[str, int] = {}
        self._events: queue.Queue[TokenEvent] = queue.Queue()

    def connect(self, host: str, port: int, epoch: int) -> None:
        super().connect(host, port, epoch)
        self.silent.clear()
        self.epoch = epoch
        self._left.clear()
        self.submitted.clear()
        self._events = queue.Queue()

    def profile(self) -> str:
        return "measured"

    def take_over(self, measured: str) -> None:
        self.calls.append(("take_over", measured))

    def calibrate(self, request: Request) -> list[str]:
        assert request.sampling.is_greedy
        return [f"a text after {len(request.prompt_tokens)} tokens was hard"]

    def submit(self, epoch: int, requests: list[Request]) -> None:
        for request in requests if epoch == self.epoch else ():
            assert request.id not in self._left, "submitted twice"
            prompt = "".join(map(chr, request.prompt_tokens))
            said = len(request.output_tokens)
            self._emitted[request.id] = said
            self._left[request.id] = [ord(char) for char in self.crew.answer(prompt)][said:]
            self.submitted.append(request)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def next_events(self, epoch: int, timeout_s: float) -> list[TokenEvent]:
        try:
            return [self._events.get(timeout=min(timeout_s, 0.02))] if epoch == self.epoch else []
        except queue.Empty:
            return []

    def serve(self) -> None:
        while not self._stop.wait(ROUND_S):
            for request in () if self.silent.is_set() else list(self.submitted):
                if request.id in self._left:
                    self._events.put(self._round(request))
        for target in self.crew.targets:
            if self._error is None:
                target.stop()
            elif target is self.crew.targets[0]:
                target.die_of(LinkLostError("link: closed by the other end"))
            else:  # they pause
                target.stop()

    def _round(self, request: Request) -> TokenEvent:
        room = request.sampling.max_tokens - self._emitted[request.id]
        tokens = self._left[request.id][: min(3, room)]
        self._left[request.id] = self._left[request.id][len(tokens) :]
        self._emitted[request.id] += len(tokens)
        reason = ""
        if request.id in self.cancelled:
            tokens, reason = [], "cancelled"
        elif self._emitted[request.id] == request.sampling.max_tokens:
            reason = "length"
        elif not self._left[request.id]:
            reason = "stop"
        if reason:
            del self._left[request.id]
        count = len(tokens)
        logprobs = tuple(_logprobs(token, request.sampling) for token in tokens)
        stats = RequestStats(num_rounds=-(-self._emitted[request.id] // 3))
        second = Origin.DRAFT if request.acceptance.rule == "exact" else Origin.KEPT
        origins = (Origin.DRAFT, second, Origin.TARGET)[:count]
        logprobs = logprobs if request.sampling.logprobs else ()
        tree = _tree_of(tokens[:2]) if request.draft.tree else NO_TREE
        return TokenEvent(request.id, tuple(tokens), origins, logprobs, reason, "", stats, tree)


def _logprobs(token: int, sampling: SamplingParams) -> TokenLogprobs:
    """Of a token that is likelier than its neighbours."""
    likeliest = ((token, -0.5), (token - 1, -1.5), (token + 1, -2.5))
    return TokenLogprobs(-0.5, likeliest[: sampling.top_logprobs])


def _tree_of(accepted: Sequence[int]) -> RoundTree:
    """Its root is a "."; one more node hangs below the accepted ones."""
    nodes = range(len(accepted) + 1)
    return RoundTree((ord("."), *accepted, ord("?")), (0, *nodes), tuple(nodes[1:]))


class FakeCrew(Orders):
    """Spawns fakes, as a client does actors; the newest of each name are at hand."""

    def __init__(self, answer: Callable[[str], str], threads: ThreadPoolExecutor) -> None:
        super().__init__()
        self.answer = answer
        self.workers: dict[str, Any] = {}
        self.spawned: list[str] = []
        self.made: list[FakeTarget] = []
        self.prepare_next: dict[
            str, Callable[[FakeTarget], None]
        ] = {}  # by name, for the next that is spawned
        self._threads = threads

    async def spawn(self, name: str) -> "LocalHandle":
        return self.make(name)

    def make_all(self) -> dict[str, "LocalHandle"]:
        """A new worker of each name."""
        return {name: self.make(name) for name in worker_names(FAKE_CONFIG)}

    def handles(self) -> dict[str, "LocalHandle"]:
        """Of the newest workers."""
        return {name: LocalHandle(worker, self._threads) for name, worker in self.workers.items()}

    def make(self, name: str) -> "LocalHandle":
        rank = FakeRank0(self) if name == "target 0" else FakeTarget()
        worker = FakeDraft(self) if name == "draft" else rank
        self.prepare_next.pop(name, lambda _: None)(worker)
        self.made += [worker.inner] if isinstance(worker, FakeRank0) else []
        self.workers[name] = worker
        self.spawned.append(name)
        self.made.append(worker)
        return LocalHandle(worker, self._threads)

    def kill(self, worker: "LocalHandle") -> None:
        worker.worker.kill()

    @property
    def draft(self) -> FakeDraft:
        draft: FakeDraft = self.workers["draft"]
        return draft

    @property
    def targets(self) -> list[FakeTarget]:
        return [worker for name, worker in self.workers.items() if name != "draft"]


class LocalHandle:
    """Calls a fake as the Coordinator calls an actor: `handle.method.remote(...)` is awaitable."""

    def __init__(self, worker: FakeTarget, threads: ThreadPoolExecutor) -> None:
        self.worker = worker
        self._threads = threads

    def __getattr__(self, name: str) -> "LocalMethod":
        return LocalMethod(self.worker, name, self._threads)


@dataclass(frozen=True)
class LocalMethod:
    worker: FakeTarget
    name: str
    threads: ThreadPoolExecutor

    def remote(self, *args: object) -> "asyncio.Future[Any]":
        return asyncio.get_running_loop().run_in_executor(self.threads, self._call, *args)

    def _call(self, *args: object) -> Any:
        if self.worker.was_killed:
            raise ActorDiedError
        result = getattr(self.worker, self.name)(*args)
        if self.worker.was_killed:
            raise ActorDiedError
        return result


@dataclass(frozen=True)
class FakeDeployment:
    """A started Coordinator and the fakes behind it."""

    coordinator: Coordinator
    crew: FakeCrew
    warnings: list[str]  # of the start

    @property
    def draft(self) -> FakeDraft:
        return self.crew.draft

    @property
    def targets(self) -> list[FakeTarget]:
        return self.crew.targets


@asynccontextmanager
async def fake_deployment(
    answer: Callable[[str], str], config: Config = FAKE_CONFIG
) -> AsyncIterator[FakeDeployment]:
    """Brings a Coordinator up on fakes in this event loop, and down again."""
    with ThreadPoolExecutor(64) as threads:
        crew = FakeCrew(answer, threads)
        coordinator = Coordinator(config, crew, char_admission)
        try:
            warnings = await coordinator.start(crew.make_all())
            yield FakeDeployment(coordinator, crew, warnings)
        finally:
            for worker in crew.made:
                worker.was_killed = True
                worker.stop()
            await coordinator.stop()


def endless(prompt: str) -> str:
    """An answer that does not end within a test."""
    return "and so on " * 100_000
