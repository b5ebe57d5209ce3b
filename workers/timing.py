"""How long a device works on something. A GPU is handed work and does it later, so the host's clock says when it was
handed over; events on the device's own time line say when it was done."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Protocol

import torch

from outrider.workers.trace import Tracer


class Stopwatch(Protocol):
    """Times stretches of work that follow each other on one device."""

    def start(self) -> None:
        """Marks where the first stretch begins; forgets what was before."""
        ...

    def lap(self) -> None:
        """Marks where a stretch ends, and the next begins; does not wait."""
        ...

    def laps_ns(self) -> list[int]:
        """Nanoseconds of each stretch so far; waits until the device has done the last."""
        ...


class HostStopwatch:
    """Of a CPU, where work is done when a call returns."""

    def __init__(self) -> None:
        self._marks: list[int] = []

    def start(self) -> None:
        self._marks = [time.monotonic_ns()]

    def lap(self) -> None:
        self._marks.append(time.monotonic_ns())

    def laps_ns(self) -> list[int]:
        return [after - before for before, after in pairwise(self._marks)]


class CudaStopwatch:
    """Of the current stream of the current GPU; a stretch counts the time that the GPU waits for its next work."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []  # kept: making one takes as long as recording it
        self._num_marks = 0

    def start(self) -> None:
        self._num_marks = 0
        self.lap()

    def lap(self) -> None:
        if self._num_marks == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[self._num_marks].record()
        self._num_marks += 1

    def laps_ns(self) -> list[int]:
        marks = self._events[: self._num_marks]
        marks[-1].synchronize()
        return [round(before.elapsed_time(after) * 1e6) for before, after in pairwise(marks)]


def stopwatch_of(device: torch.device) -> Stopwatch:
    """For work on this device."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()


class Stretches:
    """Stretches of a worker's time on a device, of which a `Tracer` hears once they are done.

    stretches.begin(); ...; stretches.end("forward", rows); ...; stretches.end("sample", rows); stretches.settle()
    """

    def __init__(self, device: torch.device, tracer: Tracer) -> None:
        self._stopwatch = stopwatch_of(device)
        self._tracer = tracer
        self._kinds: list[tuple[str, int]] = []
        self._begun_ns = 0

    def begin(self) -> None:
        """The first stretch begins here; stretches that were not settled are forgotten."""
        self._kinds.clear()
        self._begun_ns = time.monotonic_ns()
        self._stopwatch.start()

    def end(self, kind: str, rows: int = 0) -> None:
        """What was handed to the device since the last mark is one stretch of this kind; see `Tracer.span`."""
        self._stopwatch.lap()
        self._kinds.append((kind, rows))

    def settle(self) -> list[float]:
        """Waits for the device; seconds of each stretch, in order, which the tracer has now as well.

        Where results have come to the host there is nothing left to wait for. Where none have, as after reading a
        prompt, the wait is what keeps its time from being booked under whatever comes next.
        """
        laps_ns = self._stopwatch.laps_ns()
        at_ns = self._begun_ns
        for (kind, rows), lap_ns in zip(self._kinds, laps_ns, strict=True):
            self._tracer.add(kind, rows, at_ns, lap_ns)
            at_ns += lap_ns
        return [lap_ns * 1e-9 for lap_ns in laps_ns]
