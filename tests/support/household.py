"""The processes of a server that runs, watched from outside: their memory, and what of them is left at the end."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

WORKERS = ("TargetActor", "DraftActor", "Coordinator")
_PERIOD_S = 2.0
_SHARED = Path("/dev/shm")


@dataclass
class Household:
    """All processes under one, from when this is entered to when it is left.

    memory_mib: of all together (shared memory counted once), every two seconds, with the seconds since the beginning.
    """

    pid: int
    memory_mib: list[tuple[float, float]] = field(default_factory=list)

    def __enter__(self) -> "Household":
        self._seen = {psutil.Process(self.pid)}
        self._segments_before = set(_SHARED.iterdir())
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._over.set()
        self._watching.join()

    def workers(self) -> dict[int, str]:
        """Process ids and classes of the workers that live now, also of those that only start."""
        found = {}
        for process in self._living():
            with suppress(psutil.Error):
                title = process.cmdline()[0]
                for name in WORKERS:
                    if title.startswith("ray::") and name in title:
                        found[process.pid] = name
        return found

    def growth_mib(self) -> tuple[float, float]:
        """Memory in the second and in the last quarter of the time: the first is for warming up."""
        samples = [mib for _, mib in self.memory_mib]
        quarter = max(1, len(samples) // 4)
        second, last = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
        return sum(second) / len(second), sum(last) / len(last)

    def left(self, limit_s: float) -> list[str]:
        """After the end of the first process: others that stay for so long, and shared memory that nobody uses."""
        limit = time.monotonic() + limit_s
        while (processes := [one for one in self._seen if _lives(one)]) and time.monotonic() < limit:
            time.sleep(0.1)
        segments = set(_SHARED.iterdir()) - self._segments_before
        nobodys = segments - _in_use() if segments else segments
        return [*(" ".join(one.cmdline()) for one in processes), *map(str, nobodys)]

    def _living(self) -> list[psutil.Process]:
        """Under the first process, now."""
        with suppress(psutil.NoSuchProcess):
            living = psutil.Process(self.pid).children(recursive=True)
            self._seen.update(living)
            return living
        return []

    def _watch(self) -> None:
        begun_s = time.monotonic()
        while not self._over.wait(_PERIOD_S):
            num_bytes = 0
            for process in (psutil.Process(self.pid), *self._living()):
                with suppress(psutil.Error):
                    num_bytes += process.memory_full_info().pss
            self.memory_mib.append((time.monotonic() - begun_s, num_bytes / 2**20))


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _in_use() -> set[Path]:
    """Of shared memory that has a name, what any process has open or mapped."""
    used = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            used |= {Path(entry.path) for entry in process.memory_maps()}
            used |= {path.readlink() for path in Path(f"/proc/{process.pid}/fd").iterdir()}
    return used
