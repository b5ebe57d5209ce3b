"""Rows of tensors from one process to another: how many first, then the rows.

Control messages say what was decided and are host data; hidden rows are tensors, and stay on their devices: gloo
carries them between CPUs, NCCL between GPUs. Only the rows that somebody asked for are sent. The number travels as
host data, because the other end has to know it before it can receive; with it a message of no rows is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from outrider.workers.communicator import PeerLostError

T = TypeVar("T")


class PointToPoint(Protocol):
    """A process group of two, as torch.distributed makes them: gloo's calls wait for the transfer, NCCL's `wait` only
    puts it before what the current stream does next."""

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any: ...


@dataclass(frozen=True)
class Pair:
    """Two processes that send each other rows; `distributed.join_pair` makes one.

    Attributes:
        counts: carries host tensors.
        rows: carries tensors of the device: the same as `counts` on a CPU.
        peer: the other one's rank in both.
        device: where this end's rows are.
    """

    counts: PointToPoint
    rows: PointToPoint
    peer: int
    device: torch.device


class RowSender:
    """One direction of a pair. Its buffer is made once: no allocation, and one address for NCCL."""

    def __init__(self, pair: Pair, max_rows: int, width: int, dtype: torch.dtype) -> None:
        self._pair = pair
        self._count = torch.zeros(1, dtype=torch.int64)
        self._buffer = torch.empty(max_rows, width, dtype=dtype, device=pair.device)

    def send(self, rows: Tensor) -> None:
        """Sends [n, width]; `rows` may be changed by what its stream does afterwards.

        Raises:
            ValueError: more rows than both ends agreed on, or of another shape or type.
            PeerLostError: the other end is gone or has not received for too long.
        """
        _check(rows, self._buffer)
        count = rows.shape[0]
        self._count[0] = count
        _carried(lambda: self._pair.counts.send([self._count], self._pair.peer, 0).wait())
        if count:
            part = self._buffer[:count].copy_(rows)
            _carried(lambda: self._pair.rows.send([part], self._pair.peer, 1).wait())


class RowReceiver:
    """The other end of a `RowSender`, with the same limits."""

    def __init__(self, pair: Pair, max_rows: int, width: int, dtype: torch.dtype) -> None:
        self._pair = pair
        self._count = torch.zeros(1, dtype=torch.int64)
        self._buffer = torch.empty(max_rows, width, dtype=dtype, device=pair.device)

    def receive(self) -> Tensor:
        """The next rows, [n, width] on this end's device, valid until the next call.

        Raises PeerLostError when the other end is gone or has not sent for too long.
        """
        _carried(lambda: self._pair.counts.recv([self._count], self._pair.peer, 0).wait())
        part = self._buffer[: int(self._count)]
        if len(part):
            _carried(lambda: self._pair.rows.recv([part], self._pair.peer, 1).wait())
        return part


def _check(rows: Tensor, buffer: Tensor) -> None:
    fits = rows.dim() == 2 and rows.shape[0] <= buffer.shape[0] and rows.shape[1] == buffer.shape[1]
    if not fits or rows.dtype != buffer.dtype:
        raise ValueError(
            f"rows must be at most {list(buffer.shape)} of {buffer.dtype}, got {list(rows.shape)} of {rows.dtype}"
        )


def _carried(transfer: Callable[[], T]) -> T:
    try:
        return transfer()
    except RuntimeError as error:  # of gloo or NCCL
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise PeerLostError(f"rows: {line}") from error
