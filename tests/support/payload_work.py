"""The target's end of a pair that carries rows, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outrider.workers.distributed import connect_store, join_pair
from outrider.workers.payload import Pair, RowSender
from support.rank_processes import HOST, die

MAX_ROWS, WIDTH, DTYPE = 40, 96, torch.bfloat16
COUNTS = (3, 0, 40, 1, 0, 17)


@dataclass(frozen=True)
class PairPlace:
    """Where one end meets the other."""

    port: int
    timeout_s: float

    def join(self, is_target: bool) -> Pair:
        store = connect_store(HOST, self.port, self.timeout_s)
        return join_pair(store, 0, is_target, torch.device("cpu"), self.timeout_s)


def rows_of(message: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(message)
    return torch.randn(COUNTS[message], WIDTH, generator=generator).to(DTYPE)


def send_all(place: PairPlace) -> None:
    """Every message from the same memory, strided, which is changed as soon as it was sent."""
    sender = RowSender(place.join(is_target=True), MAX_ROWS, WIDTH, DTYPE)
    memory = torch.zeros(MAX_ROWS, 2 * WIDTH, dtype=DTYPE)
    for message, count in enumerate(COUNTS):
        memory[:count, ::2] = rows_of(message)
        sender.send(memory[:count, ::2])
        memory.fill_(torch.nan)


def die_before_the_second(place: PairPlace) -> None:
    sender = RowSender(place.join(is_target=True), MAX_ROWS, WIDTH, DTYPE)
    sender.send(rows_of(0))
    connect_store(HOST, place.port, place.timeout_s).wait(["received"])
    die()
