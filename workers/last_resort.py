"""How a process ends that cannot be reached: its main thread waits in a call of CUDA for ranks that no longer are.

A replayed graph holds its sums over ranks in a kernel that spins until the others come. torch's own watchdog does not
look at captured sums, and the thread that waits cannot be woken by an exception. So another thread of the process
breaks the connections, which ends such kernels where NCCL still can, and ends the process where nothing else does:
the driver then takes back its GPU. See docs/gpu.md.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# A rank that is woken needs milliseconds; one that waits for a round hears of a lost peer with the next.
ABORT_GRACE_S = 10.0


class Interruptible:
    """Work of one thread that another thread can bring to an end."""

    def __init__(self) -> None:
        self._idle = threading.Event()
        self._idle.set()

    @contextmanager
    def working(self) -> Iterator[None]:
        """The block that `end` ends."""
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    def end(self, wake: Sequence[Callable[[], None]], grace_s: float) -> None:
        """Returns when the other thread has left its block; else this process is gone after `grace_s` seconds.

        Args:
            wake: calls that should make the other thread raise. They have threads of their own, and may hang.
        """
        if self._idle.is_set():
            return
        for call in wake:
            threading.Thread(target=call, name="abort", daemon=True).start()
        if not self._idle.wait(grace_s):
            os.kill(os.getpid(), signal.SIGKILL)
