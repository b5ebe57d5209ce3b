"""A rank whose loop cannot be woken."""

import threading

from outrider.workers.target import TargetWorker


class StuckTarget(TargetWorker):
    """Its loop waits as for a kernel that never ends, and so does what should wake it."""

    def _run(self) -> None:
        self._wake.append(_hang)
        threading.Event().wait()


def _hang() -> None:
    threading.Event().wait()
