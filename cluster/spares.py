"""Processes that have started and wait, each to take the place of one that may be lost (`cluster.spares`)."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

_LATER_S = 1.0  # a restart comes first: it wants the processors
_ASK_S = 0.2


class Spares:
    """One for each of `names`, in time: a spare that is taken is replaced.

    create: a new process by name; does not wait for it, and must answer to `progress`. All is done under `lock`, and
    nothing any longer once `closed` is set.
    """

    def __init__(
        self,
        names: Sequence[str],
        create: Callable[[str], Any],
        lock: threading.Lock,
        closed: threading.Event,
    ) -> None:
        self._names = tuple(names)
        self._create = create
        self._lock = lock
        self._closed = closed
        self._waiting: dict[str, Any] = {}

    def take(self, name: str) -> Any | None:
        """The spare of this name, which may still be about to start; None where there is none that lives. The
        caller has the lock."""
        spare = self._waiting.pop(name, None)
        return spare if spare is not None and not _has_died(spare) else None

    def refill_later(self, pause_s: float = _LATER_S) -> None:
        """Does not wait."""
        if self._names:
            timer = threading.Timer(pause_s, self._refill)
            timer.daemon = True
            timer.start()

    def _refill(self) -> None:
        with self._lock:
            for name in self._names:
                if not self._closed.is_set() and name not in self._waiting:
                    self._waiting[name] = self._create(name)


def _has_died(spare: Any) -> bool:
    answered, _ = ray.wait([spare.progress.remote()], timeout=_ASK_S)
    try:
        ray.get(answered)
    except RayActorError:
        return True
    return False
