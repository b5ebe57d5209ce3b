"""Work on many things at a time, where each waits for a running engine most of its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_flight(items: Iterable[Item], work: Callable[[Item], Result], concurrency: int) -> Iterator[Result]:
    """What `work` makes of the items, `concurrency` at a time, as it is done; items are taken when there is room.

    Leaving early (Ctrl-C, a dead engine) gives up what is in flight; its threads end when the engine is closed.
    """
    waiting = iter(items)
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="in-flight")
    running: set[Future[Result]] = set()
    exhausted = False
    try:
        while True:
            while not exhausted and len(running) < concurrency:
                try:
                    running.add(pool.submit(work, next(waiting)))
                except StopIteration:
                    exhausted = True
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
