"""What the ranks of the group tests do, each in its own process."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from outrider.workers.link.communicator import broadcast_message
from support.rank_processes import GroupPlace, die

SHAPES = [(1,), (8, 576), (3, 5, 7), (300_000,), (1_000, 1536)]  # the last ones take several slots


def data_of(rank: int, case: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * case + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def all_reduce_everything(place: GroupPlace) -> dict[str, torch.Tensor]:
    """Sums by shape and dtype; the largest only as a few elements, all of them compared here."""
    group = place.join()
    sums = {}
    for case, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            x = data_of(place.rank, case, shape, dtype)
            result = group.all_reduce(x)
            assert result.shape == shape
            same = group.all_gather(result.view(torch.uint8))
            assert all(torch.equal(same[0], other) for other in same), "ranks disagree"
            sums[f"{case} {dtype}"] = result.float().reshape(-1)[:5000].numpy().copy()
    # Not contiguous: the result must still be right.
    strided = data_of(place.rank, 99, (6, 4), torch.float32).t()
    sums["strided"] = group.all_reduce(strided).contiguous().numpy().copy()
    group.close()
    return sums


def gather_and_broadcast(place: GroupPlace) -> tuple[Any, ...]:
    group = place.join()
    gathered = group.all_gather(torch.tensor([[place.rank, 10 * place.rank]]))
    large = group.all_gather(torch.full((400_000,), place.rank, dtype=torch.int64))
    assert all((large[rank] == rank).all() for rank in range(place.size))
    number = torch.tensor([2.5 if place.rank == 0 else 0.0], dtype=torch.float64)
    group.broadcast(number)
    buffer = torch.arange(700_000, dtype=torch.int32) if place.rank == 0 else torch.zeros(700_000).int()
    group.broadcast(buffer)
    assert torch.equal(buffer, torch.arange(700_000, dtype=torch.int32))
    for length in (0, 1, 1023, 1024, 3000):  # as long as the first block has room for, one more, much longer
        message = torch.arange(length if place.rank == 0 else 7, dtype=torch.int32)
        assert torch.equal(broadcast_message(group, message), torch.arange(length, dtype=torch.int32))
    group.close()
    return gathered.tolist(), number.item()


def many_mixed_calls(place: GroupPlace) -> bool:
    """Calls of all kinds at different paces; every result is checked on every rank."""
    group = place.join()
    for case in range(150):
        kind, length = case % 3, [1, 100, 3000][case // 3 % 3]
        everyone = torch.stack([data_of(rank, case, (length,), torch.float32) for rank in range(place.size)])
        if (case + place.rank) % 30 == 0:
            time.sleep(0.003)
        own = everyone[place.rank].clone()
        if kind == 0:
            torch.testing.assert_close(group.all_reduce(own), everyone.sum(0))
        elif kind == 1:
            assert torch.equal(group.all_gather(own), everyone)
        else:
            group.broadcast(own)
            assert torch.equal(own, everyone[0])
    group.close()
    return True


def last_rank_dies_others_reduce(place: GroupPlace) -> None:
    group = place.join()
    group.all_reduce(torch.ones(10))
    if place.rank == place.size - 1:
        die()
    for _ in range(3):
        group.all_reduce(torch.ones(10))


def last_rank_dies_others_wait_for_rank_0(place: GroupPlace) -> None:
    """Rank 0 notices when it next sends; the others must not go on waiting for rank 0."""
    group = place.join()
    group.all_reduce(torch.ones(10))
    if place.rank == place.size - 1:
        die()
    if place.rank == 0:
        time.sleep(0.3)
    for _ in range(20):
        group.broadcast(torch.ones(200_000))
        group.all_gather(torch.ones(1))


def rank_0_dies_others_wait_for_it(place: GroupPlace) -> None:
    group = place.join()
    group.all_reduce(torch.ones(10))
    if place.rank == 0:
        time.sleep(0.2)
        die()
    group.broadcast(torch.ones(10))


def rank_0_closes_others_wait_for_it(place: GroupPlace) -> str:
    group = place.join()
    group.all_reduce(torch.ones(10))
    if place.rank == 0:
        time.sleep(0.2)
        group.close()
        place.wait_until_done()
        return "closed"
    try:
        group.broadcast(torch.ones(10))
    finally:
        place.say_done()
    return "not reached"


def rank_0_gives_up(place: GroupPlace) -> None:
    """Another thread of rank 0 aborts while all ranks wait: rank 0 for rank 1, which sleeps, others for both."""
    group = place.join()
    group.all_reduce(torch.ones(10))
    if place.rank == 0:
        threading.Timer(0.3, group.abort).start()
    if place.rank == 1:
        time.sleep(1.0)
    for _ in range(3):
        group.all_reduce(torch.ones(10))


def last_rank_stays_silent(place: GroupPlace) -> str:
    group = place.join()
    group.all_reduce(torch.ones(10))
    if place.rank == place.size - 1:
        place.wait_until_done()
        return "waited"
    try:
        group.all_reduce(torch.ones(10))
    finally:
        place.say_done()
    return "not reached"


def mapped_files(place: GroupPlace) -> list[str]:
    """Named shared memory that this process has mapped or open while it is in the group."""
    group = place.join()
    group.all_reduce(torch.ones(10))
    maps = Path("/proc/self/maps").read_text().splitlines()
    group.all_reduce(torch.ones(10))
    group.close()
    return [line for line in maps if "/dev/shm" in line and "/dev/shm/sem." not in line]


def kind_of_group(place: GroupPlace) -> str:
    group = place.join()
    group.all_reduce(torch.ones(1))
    group.close()
    return type(group).__name__


def survive_the_death_of_rank_1(place: GroupPlace) -> float:
    """Rank 0 loses rank 1 and meets its successor under the next epoch."""
    group = place.join()
    if place.rank == 1 and place.epoch == 0:
        die()
    if place.epoch == 0:
        try:
            for _ in range(3):
                group.all_reduce(torch.ones(10))
        except ConnectionError:
            group.close()
        place = GroupPlace(place.port, 1, 0, 2, place.transport, place.timeout_s)
        group = place.join()
    total = group.all_reduce(torch.full((3,), 1.0 + place.rank)).sum().item()
    group.close()
    return total
