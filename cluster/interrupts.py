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
    Signals reach the main thread only; elsewhere there is nothing to defer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if interrupted:
            raise KeyboardInterrupt
