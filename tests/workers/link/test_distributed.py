"""The target's group and the link, between real processes. A process that hangs fails its test."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from outrider.workers.link import distributed
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.distributed import connect_store, join_group, open_store
from outrider.workers.link.link import NO_PAYLOAD, Packet
from outrider.workers.link.lost import PeerLostError
from outrider.workers.link.places import payload_device
from outrider.workers.link.shared_memory import shared_memory_supported
from support import group_work, link_work
from support.group_work import SHAPES, data_of
from support.rank_processes import GROUP_TIMEOUT_S, HOST, GroupPlace, LinkPlace, RankProcesses, run_group

CPU = torch.device("cpu")
TRANSPORTS = [
    "gloo",
    pytest.param("shm", marks=pytest.mark.skipif(not shared_memory_supported(), reason="needs x86-64")),
]
GROUPS = [(transport, size) for transport in ("gloo", "shm") for size in (2, 3)]
groups = pytest.mark.parametrize(("transport", "size"), GROUPS)


@groups
def test_all_reduce_gives_every_rank_the_same_bits(transport: str, size: int) -> None:
    outcomes = run_group(group_work.all_reduce_everything, size, transport)
    for case, shape in enumerate(SHAPES):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
            expected = sum(data_of(rank, case, shape, dtype).float() for rank in range(size))
            for outcome in outcomes:
                result = torch.from_numpy(outcome.value[f"{case} {dtype}"])
                torch.testing.assert_close(
                    result, expected.reshape(-1)[:5000], atol=tolerance, rtol=tolerance
                )
    strided = sum(data_of(rank, 99, (6, 4), torch.float32) for rank in range(size)).t()
    for outcome in outcomes:
        torch.testing.assert_close(torch.from_numpy(outcome.value["strided"]), strided)


@groups
def test_all_gather_and_broadcast(transport: str, size: int) -> None:
    for outcome in run_group(group_work.gather_and_broadcast, size, transport):
        assert outcome.value == ([[[rank, 10 * rank]] for rank in range(size)], 2.5)


@groups
def test_many_calls_at_different_paces(transport: str, size: int) -> None:
    assert all(outcome.value for outcome in run_group(group_work.many_mixed_calls, size, transport))


@groups
@pytest.mark.parametrize(
    "work", [group_work.last_rank_dies_others_reduce, group_work.last_rank_dies_others_wait_for_rank_0]
)
def test_a_killed_rank_is_noticed_by_all(transport: str, size: int, work: object) -> None:
    outcomes = run_group(work, size, transport)
    assert outcomes[-1].exit_code == -9
    assert all(outcome.lost for outcome in outcomes[:-1])


@groups
def test_a_killed_rank_0_is_noticed_by_those_who_wait_for_it(transport: str, size: int) -> None:
    outcomes = run_group(group_work.rank_0_dies_others_wait_for_it, size, transport)
    assert outcomes[0].exit_code == -9
    assert all(outcome.lost for outcome in outcomes[1:])


@groups
def test_a_rank_that_leaves_is_noticed(transport: str, size: int) -> None:
    outcomes = run_group(group_work.rank_0_closes_others_wait_for_it, size, transport)
    assert outcomes[0].value == "closed"
    assert all(outcome.lost for outcome in outcomes[1:])


@groups
def test_abort_from_another_thread_wakes_all_ranks(transport: str, size: int) -> None:
    outcomes = run_group(group_work.rank_0_gives_up, size, transport)
    assert all(outcome.lost for outcome in outcomes)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_lives_but_does_not_answer_is_given_up(transport: str) -> None:
    outcomes = run_group(group_work.last_rank_stays_silent, 2, transport, timeout_s=3.0)
    assert outcomes[0].lost
    assert outcomes[1].value == "waited"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_group_is_rebuilt_under_the_next_epoch(transport: str) -> None:
    store = open_store(HOST, GROUP_TIMEOUT_S)
    processes = RankProcesses()
    for epoch, rank in ((0, 0), (0, 1), (1, 1)):
        place = GroupPlace(store.port, epoch, rank, 2, transport, GROUP_TIMEOUT_S)
        processes.start(group_work.survive_the_death_of_rank_1, place)
    survivor, dead, successor = processes.outcomes()
    assert dead.exit_code == -9
    assert survivor.value == successor.value == 9.0


def test_shared_memory_has_no_name_that_could_be_left_behind() -> None:
    assert all(not outcome.value for outcome in run_group(group_work.mapped_files, 2, "shm"))


def test_auto_takes_shared_memory_on_one_host() -> None:
    kinds = [outcome.value for outcome in run_group(group_work.kind_of_group, 2, "auto")]
    assert kinds == ["ShmCommunicator" if shared_memory_supported() else "GroupCommunicator"] * 2


def test_a_group_of_one_needs_nobody() -> None:
    group = join_group(open_store(HOST, 5.0), 0, 0, 1, "gloo", 5.0, CPU)
    assert isinstance(group, SoloCommunicator)
    x = torch.randn(3)
    assert torch.equal(group.all_reduce(x), x)
    assert torch.equal(group.all_gather(x), x[None])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_whose_peers_do_not_come_says_so(transport: str) -> None:
    store = open_store(HOST, 1.0)
    with pytest.raises(PeerLostError):
        join_group(store, 0, 0, 2, transport, 1.0, CPU)


def test_a_store_that_is_not_there() -> None:
    store = open_store(HOST, 5.0)
    port = store.port
    del store
    with pytest.raises(PeerLostError, match=f"no store at {HOST}:{port}"):
        connect_store(HOST, port, 1.0)


ONES = Packet(torch.ones(4, dtype=torch.int32), NO_PAYLOAD)


def start_link(work: object, timeout_s: float = GROUP_TIMEOUT_S) -> tuple[LinkPlace, RankProcesses, object]:
    store = open_store(HOST, timeout_s)
    place = LinkPlace(store.port, 0, timeout_s)
    processes = RankProcesses()
    processes.start(work, place)
    return place, processes, store


def test_link_carries_packets_of_any_length_in_order_both_ways() -> None:
    place, processes, _store = start_link(link_work.echo)
    link = place.draft_end()
    lengths = [0, 1, 1020, 1021, 3000]  # as long as the first block has room for, one more, much longer
    buffer = torch.zeros(max(lengths), dtype=torch.int32)
    sent = []
    for i in range(100):
        buffer.copy_(torch.arange(len(buffer)) - i)
        payload = torch.full((i % 2 * 100_000,), i, dtype=torch.uint8)
        packet = Packet(buffer[: lengths[i % 5]], payload)
        link.send(packet)  # the same buffer again at once: it was copied
        sent.append(Packet(packet.message.clone(), payload))
    for packet in sent:
        message, payload = link.receive()
        assert message.dtype == torch.int32
        assert torch.equal(message, packet.message)
        assert torch.equal(payload, packet.payload)
    link.close()
    assert processes.outcomes()[0].value == 100


@pytest.mark.parametrize(
    ("own_gpu", "their_gpu", "place"),
    [("a", "b", "cuda:1"), ("a", "a", "cpu"), ("a", "", "cpu"), ("", "b", "cpu"), ("", "", "cpu")],
)
def test_payloads_stay_on_gpus_where_each_end_has_its_own(own_gpu: str, their_gpu: str, place: str) -> None:
    device = torch.device("cuda:1" if own_gpu else "cpu")
    assert payload_device(device, own_gpu, their_gpu) == torch.device(place)


def test_link_polls() -> None:
    place, processes, _store = start_link(link_work.echo)
    link = place.draft_end()
    assert not link.poll()
    link.send(ONES)
    while not link.poll():
        pass
    assert link.receive().message.tolist() == [1, 1, 1, 1]
    assert not link.poll()
    link.close()
    processes.outcomes()


def test_link_reports_a_dead_peer_after_its_last_message() -> None:
    place, processes, _store = start_link(link_work.answer_once_then_die)
    link = place.draft_end()
    link.send(ONES)
    assert link.receive().message.tolist() == [1, 1, 1, 1]
    for _ in range(2):  # and again for whoever asks next
        with pytest.raises(PeerLostError):
            link.receive()
    assert link.poll()
    with pytest.raises(PeerLostError):
        link.send(ONES)
    link.close()
    assert processes.outcomes()[0].exit_code == -9


def test_link_does_not_deliver_half_a_packet() -> None:
    place, processes, _store = start_link(link_work.die_before_the_payload)
    link = place.draft_end()
    with pytest.raises(PeerLostError, match="link: "):
        link.receive()
    link.close()
    assert processes.outcomes()[0].exit_code == -9


def test_link_delivers_what_was_sent_before_it_was_closed() -> None:
    place, processes, _store = start_link(link_work.send_a_burst_then_close)
    link = place.draft_end()
    assert [int(link.receive().message[0]) for _ in range(50)] == list(range(50))
    with pytest.raises(PeerLostError, match="closed by the other end"):
        link.receive()
    place.say_done()
    processes.outcomes()


def test_link_gives_up_a_silent_peer() -> None:
    place, processes, _store = start_link(link_work.stay_silent, timeout_s=3.0)
    link = place.draft_end()
    link.send(ONES)
    with pytest.raises(PeerLostError, match="nothing received"):
        link.receive()
    place.say_done()
    processes.outcomes()


def test_link_abort_wakes_a_waiting_receive() -> None:
    place, processes, _store = start_link(link_work.echo)
    link = place.draft_end()
    threading.Timer(0.2, link.abort).start()
    with pytest.raises(PeerLostError, match="aborted"):
        link.receive()
    link.close()
    processes.outcomes()


def test_link_is_rebuilt_under_the_next_epoch() -> None:
    store = open_store(HOST, GROUP_TIMEOUT_S)
    processes = RankProcesses()
    first, second = (LinkPlace(store.port, epoch, GROUP_TIMEOUT_S) for epoch in (0, 1))
    processes.start(link_work.answer_once_then_die, first)
    link = first.draft_end()
    link.send(ONES)
    link.receive()
    with pytest.raises(PeerLostError):
        link.receive()
    link.close()
    processes.start(link_work.echo, second)
    link = second.draft_end()
    link.send(Packet(torch.full((4,), 7, dtype=torch.int32), NO_PAYLOAD))
    assert link.receive().message.tolist() == [7, 7, 7, 7]
    link.close()
    assert [outcome.exit_code for outcome in processes.outcomes()] == [-9, 0]


def test_link_threads_end_when_both_sides_close() -> None:
    place, processes, _store = start_link(link_work.echo)
    link = place.draft_end()
    link.close()
    processes.outcomes()
    receivers = [thread for thread in threading.enumerate() if thread.name == "link receiver"]
    for thread in receivers:
        thread.join(10.0)
    assert not any(thread.is_alive() for thread in receivers)


def test_link_that_nobody_meets() -> None:
    store = open_store(HOST, 1.0)
    with pytest.raises(PeerLostError, match="not met by its other end"):
        LinkPlace(store.port, 0, 1.0).draft_end()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_store_listens_on_its_address_alone(host: str) -> None:
    store = open_store(host, timeout_s=10)
    listening = {c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening if address.port == store.port} == {host}
    connect_store(host, store.port, timeout_s=10).set("key", "value")
    assert store.get("key") == b"value"


def test_nccl_ranks_on_one_gpu_are_told_so_on_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ordinals may be one GPU, and one ordinal two: the GPUs' own names count."""
    monkeypatch.setattr(distributed, "gpu_identity", lambda device: f"GPU-{device.index // 2}")
    first = open_store(HOST, 20.0)
    stores = [first, *(connect_store(HOST, first.port, 20.0) for _ in range(2))]

    def join(rank: int) -> str:
        with pytest.raises(
            ValueError, match=r"ranks 0 and 1 are on one GPU \(GPU-0\), and nccl wants"
        ) as raised:
            join_group(stores[rank], 0, rank, 3, "nccl", 20.0, torch.device("cuda", rank))
        return str(raised.value)

    with ThreadPoolExecutor(3) as threads:
        said = list(threads.map(join, range(3)))
    assert len(set(said)) == 1
    assert "cluster.num_gpus_per_target must be at least 1, or target.all_reduce gloo" in said[0]
