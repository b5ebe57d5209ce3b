"""Everything that touches torch.distributed: the meeting point, groups of ranks, the link to the DraftWorker.

The ranks of a model are the default process group of their processes, as libraries that know tensor parallelism
expect: the target's and the drafter's, which are never in one process. The link
is a group of two that stands outside of it: either side can die without the other, and comes back under the
next epoch. No port is fixed: rank 0 of the target opens a store and hands out its address.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from outrider.workers.link.communicator import (
    FIRST_BLOCK_INTS,
    Communicator,
    Role,
    SoloCommunicator,
)
from outrider.workers.link.link import NO_PAYLOAD, Packet
from outrider.workers.link.lost import PeerLostError
from outrider.workers.link.places import (
    address_towards,
    gpu_identity,
    gpu_of,
    interface_towards,
    payload_device,
    refuse_shared_gpus,
)
from outrider.workers.link.shared_memory import (
    SharedSegment,
    ShmCommunicator,
    host_identity,
    shared_memory_supported,
)

_FOREVER = timedelta(days=365)
_TARGET, _DRAFT = 0, 1  # ranks of the link
_MESSAGE, _GOODBYE = 1, 2  # flags in front of what travels on the link
_HEAD_INTS = 4  # in front of a message: the flag, its length, and the bytes of the payload in two numbers
_PAYLOAD_UNIT = 1 << 30
_BACKLOG = 512  # of connections that come at once, as in torch
_GOODBYE_S = 1.0  # an end that leaves does not wait longer for one that no longer reads

_dist: Any = dist  # stubs lack most of the groups, builds for CPUs lack that of NCCL
_Gloo = _dist.ProcessGroupGloo


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """Open the meeting point on a free port of `host`, an address of this machine. See `.port`.

    It listens there and nowhere else: a store trusts whoever reaches it.
    """
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store closes it
    )


def connect_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to the meeting point; whatever waits in it gives up after `timeout_s`.

    Raises:
        PeerLostError: nobody answers there.
    """
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise PeerLostError(f"no store at {host}:{port}") from error


def join_group(
    store: dist.TCPStore,
    epoch: int,
    rank: int,
    size: int,
    transport: str,
    timeout_s: float,
    device: torch.device,
    role: Role = "target",
) -> Communicator:
    """Join the group of a model's ranks. All call it with the same arguments but their rank, device and patience.

    Args:
        transport: `nccl`, `gloo`, `shm`, or `auto`: shm where all ranks share a host, else gloo. The tensors
            of nccl groups may be on GPU or CPU.
        timeout_s: how long to wait for a rank that does not answer.
        device: where this rank computes.
        role: whose ranks.

    Raises:
        ValueError: `shm` where it cannot work; `nccl` for ranks that share a GPU, on each of them.
        PeerLostError: a rank has not come.
    """
    if size == 1:
        return SoloCommunicator()
    meeting = dist.PrefixStore(f"epoch{epoch}/{role}", store)
    with _peer_errors(f"{role} rank {rank} did not meet the other ranks"):
        if transport == "auto":
            transport = "shm" if _share_memory(meeting, rank, size) else "gloo"
        if transport == "shm":
            return _join_shared_memory(meeting, rank, size, timeout_s, role)
        if transport == "nccl":
            refuse_shared_gpus(_of_all(meeting, rank, size, "gpu", gpu_identity(device)), role)
        return GroupCommunicator(store, meeting, rank, size, transport, timeout_s, role)


class GroupCommunicator:
    """A Communicator over the default process group."""

    def __init__(
        self,
        store: dist.TCPStore,
        meeting: dist.Store,
        rank: int,
        size: int,
        transport: str,
        timeout_s: float,
        role: Role = "target",
    ) -> None:
        """Join the default process group; one that is left from an earlier epoch is dropped.

        Args:
            store: the meeting point; the interface that leads there carries the group.
            meeting: the group's own part of it.
            transport: `gloo` or `nccl`.
        """
        if dist.is_initialized():
            _drop_default_group()
        # torch takes the interface of a default group from the environment and from nowhere else.
        interface = interface_towards(store.host, store.port)
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        dist.init_process_group(
            "gloo" if transport == "gloo" else "cpu:gloo,cuda:nccl",
            store=meeting,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
        self._store = store  # the group stops working when its store is gone
        self.transport = transport
        self._role = role
        self.rank = rank
        self.size = size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place where `x` is contiguous."""
        x = x.contiguous()
        with self._abort_on_error():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]."""
        x = x.contiguous()
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        with self._abort_on_error():
            dist.all_gather(list(out.unbind()), x)
        return out

    def broadcast(self, x: torch.Tensor) -> None:
        """Overwrite `x` (contiguous) with that of rank 0."""
        with self._abort_on_error():
            dist.broadcast(x, 0)

    def abort(self) -> None:
        """Break the connections: waiting ranks, here and elsewhere, raise PeerLostError."""
        if dist.is_initialized():
            _drop_default_group()

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            _drop_default_group()

    @contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        # gloo does not pass errors on: a rank that waits for this one would hang until the time limit.
        try:
            if not dist.is_initialized():
                raise PeerLostError("this rank has left its group")
            yield
        except RuntimeError as error:
            self.abort()
            raise PeerLostError(f"{self._role} group: {_first_line(error)}") from error


class Link:
    """Packets in order between rank 0 of the target and the DraftWorker.

    Messages go over gloo. So does the payload behind them, but where both ends have a GPU of their own: there it
    goes from one to the other over NCCL. Receiving is a thread of its own, because gloo cannot tell whether a
    message has come without waiting for it.
    """

    def __init__(
        self, store: dist.TCPStore, epoch: int, is_target: bool, device: torch.device, timeout_s: float
    ) -> None:
        """Connect the two ends; both call it.

        Args:
            store: the meeting point.
            epoch: the same on both sides; another for each attempt.
            is_target: which end this is.
            device: where payloads come from and go to.
            timeout_s: how long to wait for the other end, now and in `receive` and `send`.

        Raises:
            PeerLostError: the other end has not come.
        """
        self._rank, self._peer = (_TARGET, _DRAFT) if is_target else (_DRAFT, _TARGET)
        self._timeout_s = timeout_s
        self._sending = threading.Lock()
        self._received: queue.Queue[Packet | PeerLostError] = queue.Queue()
        self._lost: PeerLostError | None = None
        self._closed = False
        self._store = store
        options = _Gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        local = address_towards(store.host, store.port)
        options._devices = [_Gloo.create_device(hostname=local)]
        meeting = dist.PrefixStore(f"epoch{epoch}/link", store)
        with _peer_errors("the link was not met by its other end"):
            self._group = _Gloo(meeting, self._rank, 2, options)
            meeting.set(f"gpu{self._rank}", gpu_of(device))
            their_gpu = meeting.get(f"gpu{self._peer}").decode()
            self._payload_device = payload_device(device, gpu_of(device), their_gpu)
        self._payload_group = self._group
        if self._payload_device.type == "cuda":
            nccl = _dist.ProcessGroupNCCL
            self._payload_group = nccl(dist.PrefixStore("payload", meeting), self._rank, 2, nccl.Options())
        threading.Thread(target=self._receive_all, name="link receiver", daemon=True).start()

    def send(self, packet: Packet) -> None:
        """Send a packet; its message may be changed afterwards. Raises PeerLostError."""
        if self._lost is not None:
            raise self._lost
        assert not self._closed
        with self._sending:
            self._put(_MESSAGE, packet, self._timeout_s)

    def receive(self) -> Packet:
        """The next packet, the caller's own.

        Raises PeerLostError when the other end is gone (after the messages that it sent before) or silent.
        """
        try:
            packet = self._received.get(timeout=self._timeout_s)
        except queue.Empty:
            self._fail(PeerLostError(f"link: nothing received for {self._timeout_s:.0f} s"))
            packet = self._received.get()
        if isinstance(packet, PeerLostError):
            self._received.put(packet)  # for the next caller
            raise packet
        return packet

    def poll(self) -> bool:
        """Whether `receive` would return or raise at once."""
        return not self._received.empty()

    def abort(self) -> None:
        """Wake whoever waits in `receive` with PeerLostError. May be called from any thread."""
        self._fail(PeerLostError("link: aborted"))

    def close(self) -> None:
        """Say goodbye: the other end gets PeerLostError once it has read what was sent before."""
        if self._closed:
            return
        self._closed = True
        with self._sending, suppress(PeerLostError):
            nothing = Packet(torch.empty(0, dtype=torch.int32), NO_PAYLOAD)
            self._put(_GOODBYE, nothing, min(self._timeout_s, _GOODBYE_S))

    def _put(self, flag: int, packet: Packet, timeout_s: float) -> None:
        message, payload = packet.message, packet.payload.to(self._payload_device)
        first = torch.zeros(FIRST_BLOCK_INTS, dtype=torch.int32)
        beginning = message[: FIRST_BLOCK_INTS - _HEAD_INTS]
        first[_HEAD_INTS : _HEAD_INTS + len(beginning)] = beginning
        rest = message[len(beginning) :]
        first[:_HEAD_INTS] = torch.tensor([flag, len(message), *divmod(len(payload), _PAYLOAD_UNIT)])
        try:
            for part in (first, rest):
                if len(part):
                    self._group.send([part], self._peer, 0).wait(timedelta(seconds=timeout_s))
            if len(payload):
                self._payload_group.send([payload], self._peer, 0).wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise self._fail(PeerLostError(f"link: {_first_line(error)}")) from error

    def _fail(self, error: PeerLostError) -> PeerLostError:
        if self._lost is None:
            self._lost = error
            self._received.put(error)
        return self._lost

    def _receive_all(self) -> None:
        while True:
            try:
                flag, packet = self._get()
            except RuntimeError as error:
                self._fail(PeerLostError(f"link: {_first_line(error)}"))
                return
            if flag == _GOODBYE:
                self._fail(PeerLostError("link: closed by the other end"))
                self.close()  # answers, which ends the other end's thread
                return
            self._received.put(packet)

    def _get(self) -> tuple[int, Packet]:
        # No time limits: one that runs out would leave the pair unusable.
        first = torch.empty(FIRST_BLOCK_INTS, dtype=torch.int32)
        self._group.recv([first], self._peer, 0).wait(_FOREVER)
        flag, length, payload_units, payload_bytes = first[:_HEAD_INTS].tolist()
        message = first[_HEAD_INTS : _HEAD_INTS + length]
        if length > len(message):
            rest = torch.empty(length - len(message), dtype=torch.int32)
            self._group.recv([rest], self._peer, 0).wait(_FOREVER)
            message = torch.cat([message, rest])
        num_bytes = payload_units * _PAYLOAD_UNIT + payload_bytes
        payload = torch.empty(num_bytes, dtype=torch.uint8, device=self._payload_device)
        if num_bytes:
            self._payload_group.recv([payload], self._peer, 0).wait(_FOREVER)
            if payload.is_cuda:  # else it would only be there for this thread's stream
                torch.cuda.current_stream(payload.device).synchronize()
        return flag, Packet(message, payload)


def _join_shared_memory(
    meeting: dist.Store, rank: int, size: int, timeout_s: float, role: Role
) -> ShmCommunicator:
    if not shared_memory_supported():
        raise ValueError(f"{role}.all_reduce must be gloo on processors other than x86-64, got 'shm'")
    if rank == 0:
        segment = SharedSegment.create(size)
        meeting.set("segment", segment.address)
    else:
        segment = SharedSegment.open(meeting.get("segment").decode(), role)
    return ShmCommunicator(segment, rank, size, timeout_s)


def _share_memory(meeting: dist.Store, rank: int, size: int) -> bool:
    host = host_identity() if shared_memory_supported() else f"rank {rank} alone"
    return len(set(_of_all(meeting, rank, size, "host", host))) == 1


def _of_all(meeting: dist.Store, rank: int, size: int, what: str, mine: str) -> list[str]:
    """By rank, what each says of itself."""
    meeting.set(f"{what}{rank}", mine)
    return [meeting.get(f"{what}{other}").decode() for other in range(size)]


def _drop_default_group() -> None:
    # destroy_process_group alone leaves calls that wait on a dead rank waiting.
    dist.distributed_c10d._abort_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _peer_errors(what: str) -> Iterator[None]:
    try:
        yield
    except PeerLostError:
        raise
    except RuntimeError as error:
        raise PeerLostError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """What gloo says, without its advice."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(" This is typically caused")[0]


def available_backends() -> tuple[str, ...]:
    """Transports that this build of torch brings."""
    available = (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
    return tuple(name for name, is_there in available if is_there)
