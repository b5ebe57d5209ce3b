"""Tensor-parallel ranks as threads of one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class _Board:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadedCommunicator:
    """Collectives over a board that all threads see; sums go in rank order, hence equal on every rank."""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board = board
        self.rank = rank
        self.size = board.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(dim=0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x))

    def broadcast(self, x: torch.Tensor) -> None:
        x.copy_(self._exchange(x)[0])

    def abort(self) -> None:
        self._board.barrier.abort()

    def close(self) -> None:
        pass

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._board.slots[self.rank] = x.clone()
        self._board.barrier.wait()
        everyone = list(self._board.slots)
        self._board.barrier.wait()
        return everyone


def run_ranks(size: int, work: Callable[[ThreadedCommunicator], Result]) -> list[Result]:
    """Runs `work` on every rank at the same time; a rank that fails frees the others and its error is raised."""
    board = _Board(size)

    def run(rank: int) -> Result:
        try:
            return work(ThreadedCommunicator(board, rank))
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
        for error in sorted(
            (e for e in errors if e), key=lambda e: isinstance(e, threading.BrokenBarrierError)
        ):
            raise error
        return [future.result() for future in futures]
