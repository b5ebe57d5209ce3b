"""A tensor-parallel group whose ranks are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from outrider.workers.link.lost import PeerLostError

_TIMEOUT_S = 600.0

Result = TypeVar("Result")


def thread_group(size: int) -> tuple[ThreadCommunicator, ...]:
    """One communicator per rank; each is used by a thread of its own."""
    meeting = _Meeting(size)
    return tuple(ThreadCommunicator(meeting, rank) for rank in range(size))


def run_ranks(size: int, work: Callable[[ThreadCommunicator], Result]) -> list[Result]:
    """Runs `work` on every rank at the same time; a rank that fails frees the others and its error is raised."""

    def run(communicator: ThreadCommunicator) -> Result:
        try:
            return work(communicator)
        except BaseException:
            communicator.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, communicator) for communicator in thread_group(size)]
        errors = [error for error in (future.exception() for future in futures) if error]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, PeerLostError))
    return [future.result() for future in futures]


class ThreadCommunicator:
    """A `Communicator`. Sums are taken in rank order, so all ranks get the same bits."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank = rank
        self.size = len(meeting.parts)
        self._meeting = meeting

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_gather(x).sum(0) if self.size > 1 else x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self._meeting.parts[self.rank] = x
        self._wait()
        gathered = torch.stack(self._meeting.parts)
        self._wait()  # nobody overwrites its part before all have read it
        return gathered

    def broadcast(self, x: torch.Tensor) -> None:
        x.copy_(self.all_gather(x)[0])

    def abort(self) -> None:
        self._meeting.barrier.abort()

    def close(self) -> None:
        pass

    def _wait(self) -> None:
        try:
            self._meeting.barrier.wait(_TIMEOUT_S)
        except threading.BrokenBarrierError:
            raise PeerLostError("another rank gave up or is late") from None


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size
