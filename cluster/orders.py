"""Workers on order: the Coordinator says which it wants, the client's process creates them.

An actor ends with the process that created it. Workers outlive a Coordinator, and go on with the next, because it is
not the one that created them; and they end with the client, however that ends, because it is.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import ray


class Orders:
    """The Coordinator's side. Belongs to its event loop; `attach` comes first."""

    def __init__(self) -> None:
        self._wanted: list[str] = []
        self._waiting: dict[str, asyncio.Future[Any]] = {}

    def attach(self, wake: Callable[[], None]) -> None:
        """wake: lets the client's call return, so that it hears of what is wanted."""
        self._wake = wake

    async def spawn(self, name: str) -> Any:
        """A new process for a worker, once the client has created it."""
        assert name not in self._waiting, name
        self._waiting[name] = asyncio.get_running_loop().create_future()
        self._wanted.append(name)
        self._wake()
        return await self._waiting[name]

    def kill(self, worker: Any) -> None:
        """Ends its process, whatever it does."""
        ray.kill(worker)

    def wanted(self) -> tuple[str, ...]:
        """Names of workers, each of them once."""
        wanted, self._wanted = tuple(self._wanted), []
        return wanted

    def give(self, workers: Mapping[str, Any]) -> None:
        """The client has created these."""
        for name, worker in workers.items():
            self._waiting.pop(name).set_result(worker)
