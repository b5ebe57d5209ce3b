"""Ranks as processes: each runs a function of `support`, and what it returned or raised comes back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch

from outrider.workers.first_gpu.processes import PRELOADED
from outrider.workers.link.communicator import Communicator
from outrider.workers.link.distributed import Link, connect_store, join_group, open_store
from outrider.workers.link.lost import PeerLostError

HOST = "127.0.0.1"
CPU = torch.device("cpu")
GROUP_TIMEOUT_S = 120.0  # far beyond LIMIT_S: a test that passes did not wait for it
LIMIT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    value: Any
    lost: str  # the message of PeerLostError, "" if it was not raised
    exit_code: int


@dataclass(frozen=True)
class GroupPlace:
    """Where a rank meets the others."""

    port: int
    epoch: int
    rank: int
    size: int
    transport: str
    timeout_s: float

    def join(self) -> Communicator:
        store = connect_store(HOST, self.port, self.timeout_s)
        return join_group(store, self.epoch, self.rank, self.size, self.transport, self.timeout_s, CPU)

    def say_done(self) -> None:
        connect_store(HOST, self.port, LIMIT_S).set("done", "")

    def wait_until_done(self) -> None:
        connect_store(HOST, self.port, LIMIT_S).wait(["done"])


@dataclass(frozen=True)
class LinkPlace:
    """Where one end of the link meets the other."""

    port: int
    epoch: int
    timeout_s: float

    def say_done(self) -> None:
        connect_store(HOST, self.port, LIMIT_S).set("done", "")

    def wait_until_done(self) -> None:
        connect_store(HOST, self.port, LIMIT_S).wait(["done"])

    def target_end(self) -> Link:
        return Link(connect_store(HOST, self.port, self.timeout_s), self.epoch, True, CPU, self.timeout_s)

    def draft_end(self) -> Link:
        return Link(connect_store(HOST, self.port, self.timeout_s), self.epoch, False, CPU, self.timeout_s)


class RankProcesses:
    """Starts processes from a server that has torch loaded, so that each takes milliseconds."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # Modules of `support` cannot be preloaded: the server does not have the tests on its path. There is one
        # server for all tests of a process, so it has what `WorkerProcess` needs, too.
        self._context.set_forkserver_preload(PRELOADED)
        self._running: list[tuple[BaseProcess, Connection]] = []

    def start(self, work: Callable[[Any], Any], argument: object) -> None:
        """Run `work(argument)`; both must be importable by name and picklable."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run, args=(work, argument, theirs), daemon=True)
        process.start()
        theirs.close()
        self._running.append((process, ours))

    def outcomes(self) -> list[Outcome]:
        """Wait for all, in the order of their start. One that hangs or fails otherwise fails the test."""
        found = []
        try:
            for process, results in self._running:
                found.append(_outcome(process, results))
        finally:
            for process, _ in self._running:
                if process.exitcode is None:
                    process.kill()
            self._running.clear()
        return found


def run_group(
    work: Callable[[GroupPlace], Any], size: int, transport: str, timeout_s: float = GROUP_TIMEOUT_S
) -> list[Outcome]:
    """Run `work` on every rank of a fresh group."""
    store = open_store(HOST, timeout_s)
    processes = RankProcesses()
    for rank in range(size):
        processes.start(work, GroupPlace(store.port, 0, rank, size, transport, timeout_s))
    return processes.outcomes()


def die() -> NoReturn:
    """End this process as a crash would: nothing is closed, nobody is told."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _outcome(process: BaseProcess, results: Connection) -> Outcome:
    value, lost, failure = None, "", ""
    assert results.poll(LIMIT_S), "a process hangs"
    try:
        value, lost, failure = results.recv()
    except EOFError:
        lost = "it died itself"
    process.join(LIMIT_S)
    assert not failure, failure
    assert process.exitcode is not None, "a process does not end"
    return Outcome(value, lost, process.exitcode)


def _run(work: Callable[[Any], Any], argument: object, results: Connection) -> None:
    torch.set_num_threads(1)
    try:
        results.send((work(argument), "", ""))
    except PeerLostError as error:
        results.send((None, str(error), ""))
    except Exception:
        results.send((None, "", traceback.format_exc()))
