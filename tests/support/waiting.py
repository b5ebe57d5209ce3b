"""Waiting for what another thread or process does in its own time: asked again and again, twenty seconds at most."""

import asyncio
import time
from collections.abc import Callable

_LIMIT_S = 20
_PAUSE_S = 0.01


def wait_until(holds: Callable[[], bool], limit_s: float = _LIMIT_S) -> None:
    """Returns once `holds()` is true; fails after the limit."""
    limit = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < limit
        time.sleep(_PAUSE_S)


async def until(holds: Callable[[], bool]) -> None:
    """`wait_until` for a test on an event loop, which goes on meanwhile."""
    limit = time.monotonic() + _LIMIT_S
    while not holds():
        assert time.monotonic() < limit
        await asyncio.sleep(_PAUSE_S)
