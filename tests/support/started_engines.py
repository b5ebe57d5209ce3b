"""In place of `Engine.start`, in tests of commands that go on after the engine died."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from outrider.cluster.api import Progress
from outrider.configs.schema import Config

FakeEngine = TypeVar("FakeEngine")


class StartedEngines(Generic[FakeEngine]):
    """Starts fakes, each of which dies after `num_answers` answers.

    started: so far.
    """

    def __init__(self, make: Callable[[Config, int], FakeEngine]) -> None:
        self.started: list[FakeEngine] = []
        self.num_answers = 10_000
        self._make = make

    def start(self, config: Config, progress: Callable[[Sequence[Progress]], None]) -> FakeEngine:
        self.started.append(self._make(config, self.num_answers))
        return self.started[-1]
