"""Rows between two processes over gloo: as many as were sent, bit for bit, none included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from outrider.workers.communicator import PeerLostError
from outrider.workers.distributed import open_store
from outrider.workers.payload import Pair, RowReceiver, RowSender
from support import payload_work
from support.payload_work import COUNTS, DTYPE, MAX_ROWS, WIDTH, PairPlace, rows_of
from support.pretend_gpu import pretend_gpu
from support.rank_processes import HOST, LIMIT_S, RankProcesses

CPU = torch.device("cpu")


def receiver_of(work: Callable[[PairPlace], None]) -> tuple[RowReceiver, RankProcesses, Any]:
    store = open_store(HOST, LIMIT_S)
    place, processes = PairPlace(store.port, LIMIT_S), RankProcesses()
    processes.start(work, place)
    return RowReceiver(place.join(is_target=False), MAX_ROWS, WIDTH, DTYPE), processes, store


def test_rows_arrive_in_order_bit_for_bit() -> None:
    receiver, processes, _store = receiver_of(payload_work.send_all)
    for message in range(len(COUNTS)):
        assert torch.equal(receiver.receive(), rows_of(message))
    assert [outcome.exit_code for outcome in processes.outcomes()] == [0]


def test_an_end_that_dies_is_noticed() -> None:
    receiver, processes, store = receiver_of(payload_work.die_before_the_second)
    assert len(receiver.receive()) == COUNTS[0]
    store.set("received", "")
    with pytest.raises(PeerLostError, match="rows: "):
        receiver.receive()
    assert [outcome.exit_code for outcome in processes.outcomes()] == [-9]


class Remembering:
    """A group that keeps what it is given to send."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        self.sent += tensors
        return self

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        raise AssertionError

    def wait(self) -> None: ...


def test_on_a_gpu_counts_travel_from_the_host_and_rows_from_one_buffer_of_the_device() -> None:
    counts, rows = Remembering(), Remembering()
    with pretend_gpu() as device:
        sender = RowSender(Pair(counts, rows, 1, device), MAX_ROWS, WIDTH, DTYPE)
        for message in (0, 1, 3):
            sender.send(rows_of(message).to(device))
        assert [tensor.device for tensor in counts.sent] == [CPU] * 3
        assert [tuple(tensor.shape) for tensor in rows.sent] == [(3, WIDTH), (1, WIDTH)]
        assert {tensor.device for tensor in rows.sent} == {device}
        assert len({tensor.data_ptr() for tensor in rows.sent}) == 1


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(MAX_ROWS + 1, WIDTH, dtype=DTYPE),
        torch.zeros(1, WIDTH - 1, dtype=DTYPE),
        torch.zeros(WIDTH, dtype=DTYPE),
        torch.zeros(1, WIDTH),
    ],
    ids=["too many", "too narrow", "no matrix", "another type"],
)
def test_rows_that_do_not_fit_are_not_sent(rows: torch.Tensor) -> None:
    group = Remembering()
    with pytest.raises(ValueError, match=r"rows must be at most \[40, 96\] of torch\.bfloat16, got"):
        RowSender(Pair(group, group, 1, CPU), MAX_ROWS, WIDTH, DTYPE).send(rows)
    assert group.sent == []
