"""Collectives between ranks of one host, through a piece of shared memory.

Between processes that share a machine this takes microseconds where gloo takes hundreds, and a rank needs two
all-reduces per layer.

Each rank has two slots and a sequence number. For call number s a rank copies its data into its slot s mod 2,
then sets its number to s; whoever needs the data waits for that. A rank starts call s only when all numbers
have reached s - 1, that is when nobody reads what call s - 2 left in the slot any more. Writing the data
before the number is enough on x86, which does not reorder stores; other processors are refused.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import time

import torch

from outrider.workers.link.communicator import Role
from outrider.workers.link.lost import PeerLostError

SLOT_BYTES = 1 << 20
_LINE = 8  # int64 words per cache line: each rank's words have one of their own
_SEQUENCE, _PID, _STATE = 0, 1, 2  # words of a rank's line
_OPEN, _LEFT, _ABORTED = 1, 2, 3  # states; 0 until the rank has arrived
_HEADER_BYTES = 4096
_MAX_CACHED_VIEWS = 256

_YIELD_S = 0.002  # a waiting rank looks again at once for this long, letting others run in between,
_SHORT_SLEEP_S = 20e-6  # then sleeps between looks,
_LONG_WAIT_S = 0.05
_LONG_SLEEP_S = 500e-6  # and longer once nothing has come for a while
_CHECK_PEERS_S = 0.05


class SharedSegment:
    """Anonymous shared memory (memfd) that other processes of this host and user open by its address.

    It has no name in the file system, so nothing is left behind however the processes end.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        self.memory = mmap.mmap(fd, num_bytes)
        self.address = f"{_host_id()} {os.getpid()} {fd}"

    @classmethod
    def create(cls, size: int) -> SharedSegment:
        """A zeroed segment for `size` ranks."""
        fd = os.memfd_create("outrider", os.MFD_CLOEXEC)
        num_bytes = _HEADER_BYTES + 2 * size * SLOT_BYTES
        os.ftruncate(fd, num_bytes)
        return cls(fd, num_bytes)

    @classmethod
    def open(cls, address: str, role: Role = "target") -> SharedSegment:
        """The segment that another process created; that process must still have it open."""
        host, pid, fd = address.split()
        if host != _host_id():
            raise ValueError(
                f"{role}.all_reduce must be gloo or nccl when ranks are on several hosts, got 'shm'"
            )
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PeerLostError(f"rank 0 (process {pid}) no longer has its shared memory open") from error
        return cls(own, os.fstat(own).st_size)

    def close_file(self) -> None:
        """The memory stays until nobody uses it; no further process can open it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def shared_memory_supported() -> bool:
    """Whether this machine keeps the order of stores, as `ShmCommunicator` needs."""
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


def host_identity() -> str:
    """Equal in processes that can share memory: same boot of the same machine, same process numbers."""
    return _host_id()


class ShmCommunicator:
    """A Communicator over a SharedSegment. Sums are taken in rank order, so all ranks get the same bits."""

    def __init__(self, segment: SharedSegment, rank: int, size: int, timeout_s: float) -> None:
        """Wait for all ranks to arrive.

        Args:
            segment: created by one rank for `size` ranks.
            timeout_s: how long to wait for a rank that lives but does not answer.

        Raises:
            PeerLostError: a rank has not come.
        """
        self.rank = rank
        self.size = size
        self._segment = segment
        self._timeout_s = timeout_s
        self._words = memoryview(segment.memory)[:_HEADER_BYTES].cast("q")
        self._bytes = torch.frombuffer(segment.memory, dtype=torch.uint8, offset=_HEADER_BYTES)
        self._views: dict[tuple[torch.dtype, int, int], list[torch.Tensor]] = {}
        self._sequence = 0
        self._others = [other for other in range(size) if other != rank]
        self._pidfds: dict[int, int] = {}
        self._closed = False
        line = rank * _LINE
        self._words[line + _PID] = os.getpid()
        self._words[line + _STATE] = _OPEN
        self._arrive()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place where `x` is contiguous; bfloat16 and float16 are summed in float32."""
        x = x.contiguous()
        flat = x.view(-1)
        step = SLOT_BYTES // x.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step] if flat.numel() > step else flat
            slots = self._exchange(part)
            if self.size == 2:
                torch.add(slots[0], slots[1], out=part)
            elif x.dtype in (torch.bfloat16, torch.float16):
                part.copy_(torch.stack(slots).sum(0, dtype=torch.float32))
            else:
                torch.add(slots[0], slots[1], out=part)
                for slot in slots[2:]:
                    part.add_(slot)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]."""
        flat = x.contiguous().view(-1)
        out = torch.empty(self.size, flat.numel(), dtype=x.dtype)
        step = SLOT_BYTES // x.element_size()
        for start in range(0, flat.numel(), step):
            slots = self._exchange(flat[start : start + step])
            torch.stack(slots, out=out[:, start : start + step])
        return out.view(self.size, *x.shape)

    def broadcast(self, x: torch.Tensor) -> None:
        """Overwrite `x` (contiguous) with that of rank 0."""
        assert x.is_contiguous()
        flat = x.view(-1)
        step = SLOT_BYTES // x.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            slots = self._next_slots(part)
            if self.rank == 0:
                slots[0].copy_(part)
                self._words[_SEQUENCE] = self._sequence
            else:
                self._words[self.rank * _LINE + _SEQUENCE] = self._sequence
                self._wait_for(0, self._sequence)
                part.copy_(slots[0])

    def abort(self) -> None:
        """Make every rank that waits, here or elsewhere, raise PeerLostError."""
        if not self._closed:
            self._words[self.rank * _LINE + _STATE] = _ABORTED

    def close(self) -> None:
        """Leave the group."""
        if not self._closed:
            if self._words[self.rank * _LINE + _STATE] == _OPEN:
                self._words[self.rank * _LINE + _STATE] = _LEFT
            self._closed = True
            self._segment.close_file()
            for pidfd in self._pidfds.values():
                os.close(pidfd)
            self._pidfds.clear()

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Publish `part`; the parts of all ranks, valid until the next call but one."""
        slots = self._next_slots(part)
        slots[self.rank].copy_(part)
        self._words[self.rank * _LINE + _SEQUENCE] = self._sequence
        for other in self._others:
            self._wait_for(other, self._sequence)
        return slots

    def _next_slots(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Begin the next call: the ranks' slots for it, shaped like `part`, free to be written."""
        if self._closed:
            raise PeerLostError("this rank has left its group")
        for other in self._others:
            self._wait_for(other, self._sequence)
        self._sequence += 1
        parity = self._sequence & 1
        key = (part.dtype, part.numel(), parity)
        slots = self._views.get(key)
        if slots is None:
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            num_bytes = part.numel() * part.element_size()
            starts = [(parity * self.size + rank) * SLOT_BYTES for rank in range(self.size)]
            with torch.inference_mode(False):  # who comes next with this shape may be outside of it
                slots = [self._bytes[start : start + num_bytes].view(part.dtype) for start in starts]
            self._views[key] = slots
        return slots

    def _wait_for(self, other: int, sequence: int) -> None:
        words, at = self._words, other * _LINE + _SEQUENCE
        for _ in range(64):
            if words[at] >= sequence:
                return
        started = checked = time.monotonic()
        while words[at] < sequence:
            os.sched_yield()
            now = time.monotonic()
            if now - checked > _CHECK_PEERS_S:
                checked = now
                self._check_peers(other, sequence, now - started)
            if now - started > _LONG_WAIT_S:
                time.sleep(_LONG_SLEEP_S)
            elif now - started > _YIELD_S:
                time.sleep(_SHORT_SLEEP_S)

    def _check_peers(self, awaited: int, sequence: int, waited_s: float) -> None:
        for rank in range(self.size):
            state = self._words[rank * _LINE + _STATE]
            if state == _ABORTED:
                raise PeerLostError(f"rank {rank} gave up")
            late = self._words[rank * _LINE + _SEQUENCE] < sequence
            if late and state == _LEFT:
                self._give_up(f"rank {rank} has left the group")
            if rank in self._pidfds and _has_ended(self._pidfds[rank]):
                self._give_up(f"rank {rank} (process {self._words[rank * _LINE + _PID]}) has died")
        if waited_s > self._timeout_s and self._words[awaited * _LINE + _SEQUENCE] < sequence:
            self._give_up(f"rank {awaited} has not answered for {self._timeout_s:.0f} s")

    def _give_up(self, reason: str) -> None:
        self.abort()
        raise PeerLostError(reason)

    def _arrive(self) -> None:
        started = time.monotonic()
        for other in self._others:
            while self._words[other * _LINE + _STATE] == 0:
                if time.monotonic() - started > self._timeout_s:
                    self._give_up(f"rank {other} has not come within {self._timeout_s:.0f} s")
                time.sleep(0.001)
            pid = self._words[other * _LINE + _PID]
            if pid != os.getpid():
                try:
                    self._pidfds[other] = os.pidfd_open(pid)
                except ProcessLookupError:
                    self._give_up(f"rank {other} (process {pid}) has died")


def _has_ended(pidfd: int) -> bool:
    """Whether a process has ended, reaped or not."""
    return bool(select.select([pidfd], [], [], 0)[0])


def _host_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
