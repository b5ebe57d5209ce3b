"""What a command owes whoever sits before it: errors, bars, signs of life, an answer to Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column

from outrider.cluster.printable import printable

SIGN_OF_LIFE_EVERY_S = 15.0
NARROW = 60  # columns; below it bars leave their room to the figures


def say_error(message: str) -> None:
    """One line on stderr."""
    typer.echo(f"Error: {printable(message)}", err=True)


def progress_bars(console: Console, *figures: ProgressColumn) -> Progress:
    """Bars that go when they are done; on a narrow terminal the first of `figures` alone, and nothing off one."""
    text = TextColumn("{task.description}", table_column=Column(overflow="fold"))
    columns = (text, figures[0]) if console.width < NARROW else (text, BarColumn(), *figures)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class AnsweredInterrupt(KeyboardInterrupt):
    """Ctrl-C of which the user has been told."""


def answer_interrupt() -> AnsweredInterrupt:
    """Tells the user that Ctrl-C was heard: ending the processes takes seconds."""
    typer.echo("Interrupted", err=True)
    return AnsweredInterrupt()


@contextmanager
def interrupts_answered(make_room: Callable[[], None]) -> Iterator[None]:
    """Inside the block the first Ctrl-C is answered at once, on a line for which `make_room` ends what is drawn.

    Also where KeyboardInterrupt is deferred, and while the main thread is in a call of Ray's that takes seconds:
    handlers of signals wait for it to end, so a thread reads of the signal from Python's wake-up descriptor.
    """
    usual = signal.getsignal(signal.SIGINT)
    # Ignored (a job in the background) or not ours to handle: it stays so.
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        answered = False
        while signals := os.read(reader, 16):
            if signal.SIGINT in signals and not answered:
                answered = True
                make_room()
                answer_interrupt()

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise AnsweredInterrupt

    listener = threading.Thread(target=listen, name="interrupts", daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the listener, after what it has still to say
        listener.join()
        os.close(reader)


@contextmanager
def signs_of_life(
    console: Console, state: Callable[[], str], every_s: float = SIGN_OF_LIFE_EVERY_S
) -> Iterator[None]:
    """Off a terminal, where no bars are drawn, prints `state()` every `every_s` seconds."""
    if console.is_terminal:
        yield
        return
    over = threading.Event()

    def report() -> None:
        while not over.wait(every_s):
            print(state(), file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
