"""Where a worker's time goes: busy seconds per kind of span always, a Chrome/Perfetto trace on request.

A `Tracer` belongs to one thread of one worker. Spans nest; `totals` charges every moment to the innermost
open span only, so the totals of all kinds add up to the time spent inside spans, without double counting.

Format of the file: Trace Event Format, "JSON Object Format" (read by ui.perfetto.dev and chrome://tracing).
"""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

SPAN_KINDS = ("draft", "verify", "forward", "commit", "sample", "wait", "communicate", "schedule")
"""What a worker can be doing. `wait` is idle time; everything else is busy time."""

_CLOCK = "clock"


class Tracer:
    """Records what one worker does.

    worker: the name of its row in the trace, such as "draft" or "target 0".
    enabled: keep single spans for a trace. When false only the totals are kept (about half a microsecond
        per span).
    capacity: how many spans are kept; beyond that the oldest are dropped (100 bytes each or so).
    """

    def __init__(self, worker: str, enabled: bool, capacity: int = 200_000) -> None:
        self.worker = worker
        self.enabled = enabled
        self._totals_ns = dict.fromkeys(SPAN_KINDS, 0)
        self._open: list[list[Any]] = []  # [kind, rows, begin_ns, ns spent in inner spans]
        self._spans: deque[tuple[str, int, int, int]] = deque(maxlen=capacity)  # kind, rows, begin, duration

    def span(self, kind: str, rows: int = 0) -> _Span:
        """`with tracer.span("forward", rows=8): ...`; `kind` is one of `SPAN_KINDS`, `rows` is shown."""
        return _Span(self, kind, rows)

    def begin(self, kind: str, rows: int = 0) -> None:
        """The start of a span that the matching `end` closes; cheaper than `span` in the token loop."""
        self._open.append([kind, rows, time.monotonic_ns(), 0])

    def end(self) -> None:
        """Closes the span opened last."""
        kind, rows, begin_ns, inner_ns = self._open.pop()
        self.add(kind, rows, begin_ns, time.monotonic_ns() - begin_ns, inner_ns)

    def add(self, kind: str, rows: int, begin_ns: int, duration_ns: int, inner_ns: int = 0) -> None:
        """A span that was timed elsewhere, inside the one that is open; see `timing.Stretches`.

        inner_ns: of its time, what was booked already under spans inside of it.
        """
        self._totals_ns[kind] += duration_ns - inner_ns
        if self._open:
            self._open[-1][3] += duration_ns
        if self.enabled:
            self._spans.append((kind, rows, begin_ns, duration_ns))

    def totals(self) -> dict[str, float]:
        """Seconds per kind since the start (spans still open not included). Take differences for a period."""
        return {kind: ns * 1e-9 for kind, ns in self._totals_ns.items()}

    def events(self) -> list[dict[str, Any]]:
        """The recorded spans as complete ("X") Chrome trace events, preceded by one "clock" record.

        `ts` and `dur` are microseconds. `ts` is CLOCK_MONOTONIC, which all processes of a host share; the
        clock record lets `write_chrome_trace` line up workers of different hosts.
        """
        if not self.enabled:
            return []
        offset_us = (time.time_ns() - time.monotonic_ns()) / 1e3
        clock = {
            "name": _CLOCK,
            "ph": "M",
            "args": {"host": socket.gethostname(), "wall_minus_monotonic_us": offset_us},
        }
        return [clock] + [
            {
                "name": kind,
                "cat": "wait" if kind == "wait" else "busy",
                "ph": "X",
                "ts": begin_ns / 1e3,
                "dur": duration_ns / 1e3,
                "args": {"rows": rows} if rows else {},
            }
            for kind, rows, begin_ns, duration_ns in self._spans
        ]


class _Span:
    __slots__ = ("_kind", "_rows", "_tracer")

    def __init__(self, tracer: Tracer, kind: str, rows: int) -> None:
        self._tracer = tracer
        self._kind = kind
        self._rows = rows

    def __enter__(self) -> None:
        self._tracer.begin(self._kind, self._rows)

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tracer.end()


def merge_events(events_by_worker: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One list of trace events with a named row per worker, in the order given; time starts at zero.

    Workers of one host share a clock. For workers of another host the difference of the hosts' wall clocks is
    applied, so rows of different hosts are only as aligned as NTP keeps the hosts.
    """
    metadata: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "outrider"}}
    ]
    spans: list[dict[str, Any]] = []
    offset_of_host: dict[str, float] = {}
    for tid, (worker, events) in enumerate(events_by_worker.items(), start=1):
        metadata.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": worker}})
        metadata.append(
            {"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": tid, "args": {"sort_index": tid}}
        )
        shift_us = 0.0
        for event in events:
            if event["name"] == _CLOCK:
                # One offset per host, or two readings of the same clock pair would misalign its workers.
                host = event["args"]["host"]
                offset_of_host.setdefault(host, event["args"]["wall_minus_monotonic_us"])
                shift_us = offset_of_host[host] - next(iter(offset_of_host.values()))
            else:
                spans.append({**event, "ts": event["ts"] + shift_us, "pid": 1, "tid": tid})
    start_us = min((span["ts"] for span in spans), default=0.0)
    for span in spans:
        span["ts"] = round(span["ts"] - start_us, 3)
        span["dur"] = round(span["dur"], 3)
    # Perfetto nests spans by time; an outer span has to come before the inner ones that start with it.
    spans.sort(key=lambda span: (span["tid"], span["ts"], -span["dur"]))
    return metadata + spans


def write_chrome_trace(path: str | Path, events_by_worker: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes `Tracer.events()` of every worker to `path`; open it in ui.perfetto.dev."""
    trace = {"displayTimeUnit": "ms", "traceEvents": merge_events(events_by_worker)}
    Path(path).write_text(json.dumps(trace), encoding="utf-8")
