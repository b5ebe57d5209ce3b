"""A DraftWorker in rank 0's process, called as if it had one of its own."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Method:
    rank_0: Any
    name: str

    def remote(self, *arguments: Any) -> Any:
        return self.rank_0.stand_in.remote(self.name, *arguments)


@dataclass(frozen=True)
class StandInHandle:
    """`handle.method.remote(...)` calls a method of `workers.stand_in.StandIn`.

    rank_0: the actor of the target's first rank.
    """

    rank_0: Any

    def __getattr__(self, name: str) -> _Method:
        return _Method(self.rank_0, name)
