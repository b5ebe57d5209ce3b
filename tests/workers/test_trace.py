import json
from pathlib import Path

import pytest

from outrider.workers import trace
from outrider.workers.trace import SPAN_KINDS, Tracer, merge_events, write_chrome_trace


class FakeClock:
    """A clock in nanoseconds that moves only when told."""

    def __init__(self) -> None:
        self.now_ns = 5_000_000

    def advance_us(self, us: int) -> None:
        self.now_ns += us * 1000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def time_ns(self) -> int:
        return self.now_ns + 10**18


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(trace, "time", fake)
    return fake


def test_totals_accumulate_without_a_trace(clock: FakeClock) -> None:
    tracer = Tracer("target 0", enabled=False)
    for _ in range(2):
        with tracer.span("forward", rows=8):
            clock.advance_us(30)
    assert tracer.totals()["forward"] == pytest.approx(60e-6)
    assert set(tracer.totals()) == set(SPAN_KINDS)
    assert tracer.events() == []


def test_time_of_an_inner_span_is_not_charged_to_the_outer_one(clock: FakeClock) -> None:
    tracer = Tracer("draft", enabled=True)
    with tracer.span("verify"):
        clock.advance_us(10)
        tracer.begin("communicate")
        clock.advance_us(5)
        tracer.end()
        clock.advance_us(1)
    totals = tracer.totals()
    assert totals["verify"] == pytest.approx(11e-6)
    assert totals["communicate"] == pytest.approx(5e-6)
    assert sum(totals.values()) == pytest.approx(16e-6)
    # the trace itself shows both in full length
    durations = {event["name"]: event["dur"] for event in tracer.events() if event["ph"] == "X"}
    assert durations == {"verify": 16.0, "communicate": 5.0}


def test_a_span_is_closed_when_its_body_raises(clock: FakeClock) -> None:
    tracer = Tracer("draft", enabled=True)

    def fail_while_drafting() -> None:
        with tracer.span("draft"):
            clock.advance_us(3)
            raise RuntimeError("drafter failed")

    with pytest.raises(RuntimeError):
        fail_while_drafting()
    with tracer.span("wait"):
        clock.advance_us(4)
    assert tracer.totals()["wait"] == pytest.approx(4e-6)
    assert tracer.totals()["draft"] == pytest.approx(3e-6)


def test_memory_is_bounded_and_the_newest_spans_are_kept(clock: FakeClock) -> None:
    tracer = Tracer("draft", enabled=True, capacity=3)
    for rows in range(1, 6):
        with tracer.span("forward", rows=rows):
            clock.advance_us(1)
    assert [event["args"]["rows"] for event in tracer.events() if event["ph"] == "X"] == [3, 4, 5]
    assert tracer.totals()["forward"] == pytest.approx(5e-6)


def test_the_file_is_a_chrome_trace_with_one_named_row_per_worker(clock: FakeClock, tmp_path: Path) -> None:
    draft, target = Tracer("draft", enabled=True), Tracer("target 0", enabled=True)
    with draft.span("draft", rows=4):
        clock.advance_us(100)
        with target.span("forward", rows=8):
            clock.advance_us(50)
    path = tmp_path / "trace.json"
    write_chrome_trace(path, {"draft": draft.events(), "target 0": target.events()})

    document = json.loads(path.read_text())
    events = document["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert sorted(names.values()) == ["draft", "target 0"]
    complete = [event for event in events if event["ph"] == "X"]
    for event in complete:
        assert isinstance(event["name"], str)
        assert event["ts"] >= 0
        assert event["dur"] > 0
        assert isinstance(event["pid"], int)
        assert event["tid"] in names
    assert {(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in complete} == {
        ("draft", "draft", 0.0, 150.0),
        ("target 0", "forward", 100.0, 50.0),
    }
    assert all(event["ph"] in "XM" for event in events)
    assert any(e["name"] == "process_name" and e["args"]["name"] == "outrider" for e in events)


def test_rows_of_two_hosts_are_lined_up_by_their_wall_clocks() -> None:
    def events(host: str, wall_minus_monotonic_us: float, ts: float) -> list[dict]:
        return [
            {
                "name": "clock",
                "ph": "M",
                "args": {"host": host, "wall_minus_monotonic_us": wall_minus_monotonic_us},
            },
            {"name": "forward", "ph": "X", "ts": ts, "dur": 1.0, "args": {}},
        ]

    merged = merge_events(
        {
            "draft": events("a", 1000.0, 0.0),
            "target 0": events("a", 1003.0, 10.0),  # same host: the reading's jitter must not move it
            "target 1": events("b", 500.0, 520.0),  # booted 500 us later
        }
    )
    assert [event["ts"] for event in merged if event["ph"] == "X"] == [0.0, 10.0, 20.0]


def test_an_outer_span_precedes_the_inner_one_that_starts_with_it(clock: FakeClock) -> None:
    tracer = Tracer("draft", enabled=True)
    with tracer.span("verify"), tracer.span("sample"):
        clock.advance_us(2)
    with tracer.span("verify"):
        with tracer.span("sample"):
            clock.advance_us(2)
        clock.advance_us(1)
    names = [event["name"] for event in merge_events({"draft": tracer.events()}) if event["ph"] == "X"]
    assert names[2:] == ["verify", "sample"]


def test_no_workers_make_an_empty_but_valid_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(path, {})
    assert json.loads(path.read_text())["traceEvents"][0]["name"] == "process_name"
