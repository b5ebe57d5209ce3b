"""Processes that have started and wait, each to take the place of one that may be lost (`cluster.spares`)."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

_PERIOD_S = 1.0
_LATER_S = 1.0  # a restart comes first: it wants the processors
_ASK_S = 0.2


class Spares:
    """One for each of `names`, in time: a spare that is taken or dies is replaced.

    create: a new process by name; does not wait for it, and must answer to `progress`. Called under `lock`, and not
    any longer once `closed` is set.
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
        self._not_before_s = 0.0
        self._keeping = threading.Thread(target=self._keep, daemon=True)

    def begin(self, pause_s: float) -> None:
        """From now on, after a pause."""
        if self._names:
            self._not_before_s = time.monotonic() + pause_s
            self._keeping.start()

    def take(self, name: str) -> Any | None:
        """The spare of this name, which may still be about to start; None where there is none that lives. The
        caller has the lock."""
        self._not_before_s = time.monotonic() + _LATER_S
        spare = self._waiting.pop(name, None)
        return spare if spare is not None and not _has_died(spare) else None

    def join(self) -> None:
        """After `closed` was set: nothing is asked of Ray afterwards."""
        if self._keeping.is_alive():
            self._keeping.join()

    def _keep(self) -> None:
        while not self._closed.wait(_PERIOD_S):
            dead = {name: spare for name, spare in list(self._waiting.items()) if _has_died(spare)}
            with self._lock:
                for name, spare in dead.items():
                    if self._waiting.get(name) is spare:
                        del self._waiting[name]
                if self._closed.is_set() or time.monotonic() < self._not_before_s:
                    continue
                for name in self._names:
                    if name not in self._waiting:
                        self._waiting[name] = self._create(name)


def _has_died(spare: Any) -> bool:
    answered, _ = ray.wait([spare.progress.remote()], timeout=_ASK_S)
    try:
        ray.get(answered)
    except RayError:
        return True
    return False
