"""Workers in processes of their own, as Ray runs them, but without Ray: for the check of a GPU, and for tests."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from outrider.configs.schema import Config
from outrider.workers.draft import DraftWorker
from outrider.workers.draft_rank import OtherRanks
from outrider.workers.sequences.sequence import Request, TokenEvent
from outrider.workers.target import TargetWorker
from outrider.workers.weights.progress import silent

PRELOADED = ["outrider.workers.draft", "outrider.workers.target"]
CALL_S = 60.0  # on a CPU, of tiny models; a GPU's captures take longer


class WorkerProcess:
    """An object in another process, whose methods are called by name, several at a time if need be."""

    def __init__(self, make: Callable[..., object], *args: object, limit_s: float = CALL_S) -> None:
        """`make(*args)` makes the object, in its process; `limit_s` bounds the wait in `call`."""
        # A fork server imports torch once for all workers of a test run.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, make, args), daemon=True)
        self._process.start()
        remote.close()
        self._limit_s = limit_s
        self._futures: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        threading.Thread(target=self._read_answers, daemon=True).start()

    def begin(self, method: str, *args: object) -> Future[Any]:
        """Call a method without waiting for it. The future fails with what the method raised, or with EOFError
        when the process died."""
        number = next(self._numbers)
        future = self._futures[number] = Future()
        self._pipe.send((number, method, args))
        return future

    def call(self, method: str, *args: object) -> Any:
        """Call a method and wait for its result."""
        return self.begin(method, *args).result(self._limit_s)

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._process.kill()
        self._process.join(CALL_S)

    def _read_answers(self) -> None:
        while True:
            try:
                number, result, error = self._pipe.recv()
            except (EOFError, OSError):
                for future in self._futures.values():
                    if not future.done():
                        future.set_exception(EOFError("the process died"))
                return
            future = self._futures[number]
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)


def _serve(pipe: Connection, make: Callable[..., object], args: tuple[object, ...]) -> None:
    worker = make(*args)
    sending = threading.Lock()

    def answer(number: int, method: str, arguments: tuple[object, ...]) -> None:
        result, error = None, None
        try:
            result = getattr(worker, method)(*arguments)
        except Exception as raised:
            error = raised
        with sending:
            pipe.send((number, result, error))

    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        threading.Thread(target=answer, args=message, daemon=True).start()


@dataclass
class Deployment:
    """All workers of a configuration, connected and running."""

    config: Config
    targets: list[WorkerProcess]
    draft: WorkerProcess
    meeting: tuple[str, int]  # of all groups
    runs: list[Future[None]]  # of the targets by rank, then of the DraftWorker
    limit_s: float
    epoch: int = 0

    def connect(self, epoch: int) -> None:
        """Join groups and link, measure the target, and begin to serve."""
        self.epoch = epoch
        workers = [*self.targets, self.draft]
        for joining in [worker.begin("connect", *self.meeting, epoch) for worker in workers]:
            joining.result(self.limit_s)
        self.runs = [target.begin("run") for target in self.targets]
        self.draft.call("profile", silent)
        self.runs.append(self.draft.begin("run"))

    def generate(
        self, requests: list[Request], on_event: Callable[[TokenEvent], None] = lambda event: None
    ) -> dict[str, list[TokenEvent]]:
        """Run requests to their ends; the events of each."""
        collected: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        self.draft.call("submit", self.epoch, requests)
        unfinished = set(collected)
        while unfinished:
            events: list[TokenEvent] = self.draft.call("next_events", self.epoch, 10.0)
            assert events, "nothing came for ten seconds"
            for event in events:
                collected[event.request_id].append(event)
                on_event(event)
                if event.finish_reason:
                    unfinished.remove(event.request_id)
        return collected

    def stop(self) -> None:
        """Let every worker's `run` return."""
        self.draft.call("stop")
        for run in self.runs:
            run.result(self.limit_s)


@contextmanager
def deployed(
    config: Config, gpus: Sequence[int] = (), limit_s: float = CALL_S, others: OtherRanks | None = None
) -> Iterator[Deployment]:
    """Processes of a configuration, ready for requests; they are gone when the block ends.

    Args:
        gpus: what every process is given: CUDA ordinals.
        limit_s: seconds for a call of a worker.
        others: the drafter's further ranks, which stand.
    """
    ranks = range(config.target.tp_size)
    targets = [WorkerProcess(TargetWorker, config, rank, tuple(gpus), limit_s=limit_s) for rank in ranks]
    draft = WorkerProcess(DraftWorker, config, tuple(gpus), others, limit_s=limit_s)
    try:
        for loading in [worker.begin("load", silent) for worker in (*targets, draft)]:
            loading.result(limit_s)
        meeting = targets[0].call("open_store", "127.0.0.1")
        deployment = Deployment(config, targets, draft, meeting, [], limit_s)
        deployment.connect(epoch=1)
        yield deployment
        draft = deployment.draft
    finally:
        for worker in (*targets, draft):
            worker.kill()
