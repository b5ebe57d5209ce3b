"""Ctrl-C at a bad moment waits for a better one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Inside the block SIGINT is noted; KeyboardInterrupt comes at its end.

    For steps that leave processes behind when they are left half done, such as starting and stopping Ray.
    The handler that was there runs at once (it may have something to say); what it raises is deferred.
    Signals reach the main thread only; elsewhere there is nothing to defer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[KeyboardInterrupt] = []

    def note(signal_number: int, frame: FrameType | None) -> None:
        try:
            if callable(usual):
                usual(signal_number, frame)
            else:
                interrupts.append(KeyboardInterrupt())
        except KeyboardInterrupt as interrupt:
            interrupts.append(interrupt)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if interrupts:
            raise interrupts[0]
