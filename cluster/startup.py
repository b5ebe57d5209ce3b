"""The start of a deployment: what every process does, how far it is, and whether anything moves at all."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayError

from outrider.cluster.api import EngineError, Progress
from outrider.cluster.health import WorkerLostError, result_of

T = TypeVar("T")

_PERIOD_S = 0.2
_SILENT_S = 3.0  # a process that was created answers in milliseconds


class StartWatch:
    """Asks every process how far it is, and ends a start in which nothing moves.

    own: the Coordinator's own stages.
    limit_s: how long a process may be silent, and all of them stand still.
    """

    def __init__(self, handles: Mapping[str, Any], own: Callable[[], list[Progress]], limit_s: float) -> None:
        self._handles = handles
        self._own = own
        self._limit_s = limit_s
        self._seen: dict[str, list[Progress]] = {"coordinator": []}
        self._doing: dict[str, str] = {}
        now = time.monotonic()
        self._moved_s = now
        self._heard_s = dict.fromkeys(handles, now)

    def stages(self) -> list[Progress]:
        """The stages so far, of all processes."""
        return [stage for stages in {**self._seen, "coordinator": self._own()}.values() for stage in stages]

    async def step(self, name: str, doing: str, call: Awaitable[T]) -> T:
        """The result of a process's call, which is what it does until then."""
        self._doing[name] = doing
        try:
            return await result_of(name, doing, call)
        finally:
            del self._doing[name]
            self._moved_s = time.monotonic()

    async def through(self, start: Awaitable[None]) -> None:
        """Waits for the start. Raises its error, or EngineError when it stands still."""
        task = asyncio.ensure_future(start)
        polls = [asyncio.create_task(self._poll(name, handle)) for name, handle in self._handles.items()]
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=_PERIOD_S)
                self._note("coordinator", self._own())
                if not task.done():
                    self._raise_if_still()
            await task
        finally:
            for waiting in (task, *polls):
                waiting.cancel()

    async def _poll(self, name: str, handle: Any) -> None:
        while True:
            try:
                stages = await handle.progress.remote()
            except RayError:
                self._heard_s.pop(name)
                return  # the call that waits for the worker says what happened
            self._heard_s[name] = time.monotonic()
            self._note(name, stages)
            await asyncio.sleep(_PERIOD_S)

    def _note(self, name: str, stages: list[Progress]) -> None:
        if stages != self._seen.get(name, []):
            self._moved_s = time.monotonic()
        self._seen[name] = stages

    def _raise_if_still(self) -> None:
        now = time.monotonic()
        limit = f"{self._limit_s:g} s (cluster.start_timeout_s)"
        still = now - self._moved_s > self._limit_s
        silence_s = min(_SILENT_S, self._limit_s) if still else self._limit_s
        silent = [name for name, heard_s in self._heard_s.items() if now - heard_s > silence_s]
        if silent:
            raise WorkerLostError(
                f"{' and '.join(silent)} did not answer for {limit} while starting: stopped, or on a node that "
                "is gone"
            )
        if still:
            raise EngineError(f"the start stood still for {limit}: {self._whereabouts()}")

    def _whereabouts(self) -> str:
        places = []
        for name, doing in self._doing.items():
            last = next((stage for stage in reversed(self.stages()) if stage.worker == name), None)
            places.append(f"{name} is at {doing if last is None else last.stage}")
        return ", ".join(places) or "no process has begun"
