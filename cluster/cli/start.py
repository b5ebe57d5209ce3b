"""Bringing up an engine for a command, with progress bars on a terminal and signs of life off it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID, TaskProgressColumn, TimeElapsedColumn

from outrider.cluster.cli.terminal import (
    answer_interrupt,
    interrupts_answered,
    progress_bars,
    signs_of_life,
)
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.cluster.api import Progress
    from outrider.cluster.engine import Engine


class StartBars:
    """One bar for each stage of each process, as the stages are reported."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._processes = bars.add_task("start processes", total=None)
        self._tasks: dict[str, TaskID] = {}

    def show(self, stages: "Sequence[Progress]") -> None:
        """A report of all stages so far; may be called any number of times."""
        if stages:
            self._bars.update(self._processes, completed=1, total=1)
        for stage in stages:
            name = f"{stage.worker}: {stage.stage}"
            total = stage.total or None
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total)
            self._bars.update(self._tasks[name], completed=stage.done, total=total)

    def state(self) -> str:
        """What is under way, in one line."""
        under_way = [task for task in self._bars.tasks if not task.finished]
        shown = [task.description + (f" {task.percentage:.0f} %" if task.total else "") for task in under_way]
        return "starting: " + (", ".join(shown) or "nearly done")

    def finish(self) -> None:
        """Everything stands: whatever was under way is done."""
        for task in self._bars.tasks:
            total = task.total or 1
            self._bars.update(task.id, completed=total, total=total)


@contextmanager
def running_engine(config: Config) -> "Iterator[Engine]":
    """An engine that is ready, and that ends with the block."""
    # Ray and torch take seconds to import; `outrider config` and `--help` do without.
    from outrider.cluster.engine import Engine

    console = Console(stderr=True)
    with progress_bars(console, TaskProgressColumn(), TimeElapsedColumn()) as bars:
        start_bars = StartBars(bars)
        with interrupts_answered(bars.stop), signs_of_life(console, start_bars.state):
            engine = Engine.start(config, start_bars.show)
        start_bars.finish()
    with engine:
        try:
            yield engine
        except KeyboardInterrupt as interrupt:
            raise answer_interrupt() from interrupt


def with_trace(config: Config, wanted: bool) -> Config:
    """The config with traces on if one is wanted."""
    return replace(config, rounds=replace(config.rounds, trace=True)) if wanted else config


def save_trace(engine: "Engine", path: Path) -> None:
    """Writes the trace of all workers; open it in ui.perfetto.dev."""
    from outrider.workers.trace import write_chrome_trace

    write_chrome_trace(path, engine.trace())
