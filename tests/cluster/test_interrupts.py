"""Ctrl-C during a step that must not be left half done."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from outrider.cluster.interrupts import interrupts_deferred


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored; here it counts in any case."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def test_an_interrupt_comes_at_the_end_of_the_block() -> None:
    reached = []

    def step() -> None:
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_happens() -> None:
    with interrupts_deferred():
        pass


def test_other_threads_have_nothing_to_defer() -> None:
    errors = []

    def use() -> None:
        try:
            with interrupts_deferred():
                pass
        except ValueError as error:  # signal handlers belong to the main thread
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not errors
