"""Graphs and events of torch.cuda that only note what is asked of them; time passes by replays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class StandInCuda:
    """replay_ms: how long each replay takes, in order; none given: a millisecond each."""

    def __init__(self, replay_ms: Sequence[float] = ()) -> None:
        self._replay_ms = list(replay_ms)
        self._now_ms = 0.0
        self.num_replays = 0
        self.num_waits = 0
        self.num_events = 0
        self.num_pools = 0
        self.pools: list[Any] = []  # of each capture
        self.recording: list[Callable[[], object]] | None = None  # while a graph is captured: what it will do

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the place of torch.cuda's."""
        cuda = self

        class Graph:
            def __init__(self) -> None:
                self.recorded: list[Callable[[], object]] = []

            def replay(self) -> None:
                cuda.advance(cuda._replay_ms[cuda.num_replays] if cuda._replay_ms else 1.0)
                cuda.num_replays += 1
                for again in self.recorded:
                    again()

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                cuda.num_events += 1

            def record(self) -> None:
                self.at_ms = cuda._now_ms

            def synchronize(self) -> None:
                cuda.num_waits += 1

            def elapsed_time(self, later: Event) -> float:
                return later.at_ms - self.at_ms

        @contextmanager
        def graph(graph: Graph, pool: Any = "a pool of its own") -> Iterator[None]:
            cuda.pools.append(pool)
            cuda.recording = graph.recorded
            try:
                yield
            finally:
                cuda.recording = None

        def graph_pool_handle() -> str:
            cuda.num_pools += 1
            return f"pool {cuda.num_pools}"

        for name, value in (
            ("CUDAGraph", Graph),
            ("Event", Event),
            ("graph", graph),
            ("graph_pool_handle", graph_pool_handle),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def advance(self, milliseconds: float) -> None:
        """Let the GPU be busy."""
        self._now_ms += milliseconds
