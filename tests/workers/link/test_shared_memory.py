"""The shared-memory communicator with ranks as threads: what does not need processes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from outrider.workers.link import distributed
from outrider.workers.link.lost import PeerLostError
from outrider.workers.link.shared_memory import (
    SLOT_BYTES,
    SharedSegment,
    ShmCommunicator,
    shared_memory_supported,
)

pytestmark = pytest.mark.skipif(not shared_memory_supported(), reason="needs x86-64 and memfd")


def open_group(size: int) -> list[ShmCommunicator]:
    segment = SharedSegment.create(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: ShmCommunicator(segment, rank, size, 30.0), range(size)))


def on_all_ranks(group: list[ShmCommunicator], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(lambda pair: pair[0].all_reduce(pair[1]), zip(group, tensors, strict=True)))


def test_sums_go_in_rank_order() -> None:
    # (1e8 + 1) - 1e8 is 0 in float32 and 1e8 - 1e8 + 1 is 1: the order shows.
    group = open_group(3)
    for order, expected in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        sums = on_all_ranks(group, [torch.full((5,), value) for value in order])
        assert all(torch.equal(total, torch.full((5,), expected)) for total in sums)


def test_bfloat16_is_summed_in_float32() -> None:
    # 256 + 1 rounds to 256 in bfloat16; both ones together still count.
    group = open_group(3)
    values = [torch.full((4,), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert all(total.tolist() == [258.0] * 4 for total in on_all_ranks(group, values))


def test_the_sum_takes_the_place_of_the_input() -> None:
    group = open_group(2)
    inputs = [torch.ones(3, 2), torch.ones(3, 2)]
    for x, total in zip(inputs, on_all_ranks(group, inputs), strict=True):
        assert total.data_ptr() == x.data_ptr()
        assert x.tolist() == [[2.0, 2.0]] * 3


@pytest.mark.parametrize("num_bytes", [0, SLOT_BYTES - 4, SLOT_BYTES, SLOT_BYTES + 4, 3 * SLOT_BYTES])
def test_messages_around_the_size_of_a_slot(num_bytes: int) -> None:
    group = open_group(2)
    inputs = [torch.arange(num_bytes // 4, dtype=torch.float32) for _ in group]
    for total in on_all_ranks(group, inputs):
        assert torch.equal(total, 2 * torch.arange(num_bytes // 4, dtype=torch.float32))


def test_calls_after_closing_are_refused() -> None:
    group = open_group(2)
    group[0].close()
    group[0].close()
    with pytest.raises(PeerLostError):
        group[0].all_reduce(torch.ones(1))
    with pytest.raises(PeerLostError, match="rank 0 has left"):
        group[1].all_reduce(torch.ones(1))


def test_no_file_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    group = open_group(2)
    for rank in (0, 1):
        group[rank].close()
    del group  # the memory goes with the last object that uses it
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_process_opens_the_segment_by_its_address() -> None:
    segment = SharedSegment.create(2)
    same = SharedSegment.open(segment.address)
    segment.memory[0] = 77
    assert same.memory[0] == 77
    same.close_file()
    segment.close_file()
    with pytest.raises(PeerLostError):
        SharedSegment.open(segment.address)


def test_ranks_of_other_hosts_are_told_what_to_configure() -> None:
    segment = SharedSegment.create(2)
    _, pid, fd = segment.address.split()
    with pytest.raises(ValueError, match=r"target.all_reduce must be gloo or nccl .* got 'shm'"):
        SharedSegment.open(f"another-host {pid} {fd}")
    segment.close_file()


def test_processors_that_reorder_stores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    store = distributed.open_store("127.0.0.1", 5.0)
    with pytest.raises(ValueError, match=r"target.all_reduce must be gloo on processors other than x86-64"):
        distributed.join_group(store, 0, 0, 2, "shm", 5.0, torch.device("cpu"))
