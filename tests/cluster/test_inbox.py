"""The client's end of a request, with a Coordinator from a script."""

import gc
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from outrider.cluster.api import (
    Answer,
    CoordinatorLostError,
    Delivered,
    Delivery,
    EngineError,
    GenerationRequest,
    Notice,
    Piece,
    Refusal,
    Ticket,
)
from outrider.cluster.inbox import Call, CompletionStream, Inbox, PieceStream
from outrider.workers.answer import Completion
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import RequestStats
from support.waiting import wait_until

LIMIT_S = 20.0
HELLO = GenerationRequest("hello")


class Script:
    """A Coordinator: what is put into `deliveries` is what it says. And the client's process beside it, which has the
    `next` in place of a lost one, if there is one."""

    def __init__(self) -> None:
        self.next: list[Script] = []
        self.wrong = ""
        self.losses: list[tuple[str, bool, int]] = []
        self.given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.deliveries: queue.SimpleQueue[Delivery | EngineError] = queue.SimpleQueue()
        self.submitted: list[Ticket] = []
        self.cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, method: str, *args: Any) -> Any:
        if method == "submit":
            self.submitted += args[0]
            return None
        if method == "cancel":
            for request_id in args[0]:
                self.cancelled.put(request_id)
            return None
        if method == "give":
            self.given.put(args[0])
            return None
        assert method == "take"
        delivery = self.deliveries.get()
        if isinstance(delivery, EngineError):
            raise delivery
        return delivery

    def complaint(self) -> str:
        return self.wrong

    def successor(self, reason: str, answered: bool, num_restarts: int) -> Call:
        self.losses.append((reason, answered, num_restarts))
        if not self.next:
            raise EngineError(f"{reason}; no other one")
        return self.next.pop(0)

    def provide(self, names: Sequence[str]) -> dict[str, str]:
        return {name: f"a new {name}" for name in names}

    def say(self, *answers: tuple[str, Answer], failure: str = "") -> None:
        self.deliveries.put(Delivery(answers, failure))


@contextmanager
def inbox_of(script: Script) -> Iterator[Inbox]:
    inbox, last = Inbox(script, script), [script, *script.next][-1]
    yield inbox
    inbox.close("over")
    last.deliveries.put(EngineError("over"))


def failed(error: str) -> Completion:
    return Completion(finish_reason="error", error=error)


def piece(text: str, reason: str = "", error: str = "") -> Piece:
    origins = (Origin.TARGET,) * len(text)
    return Piece(tokens=tuple(map(ord, text)), origins=origins, finish_reason=reason, error=error)


def cancelled(script: Script, number: int) -> set[str]:
    return {script.cancelled.get(timeout=LIMIT_S) for _ in range(number)}


def test_answers_reach_those_who_asked() -> None:
    script = Script()
    with inbox_of(script) as inbox:
        a, b = (inbox.send([HELLO], whole=False)[0] for _ in range(2))
        script.say((b, Refusal("no")), (a, piece("x")), ("unknown", piece("z")), (a, piece("y", "stop")))
        assert [p.tokens for p in PieceStream(inbox, a)] == [(ord("x"),), (ord("y"),)]
        with pytest.raises(ValueError, match="no"):
            next(PieceStream(inbox, b))
        assert script.cancelled.empty()


@pytest.mark.parametrize("how", ["closed", "dropped", "left"])
def test_a_request_that_nobody_waits_for_is_cancelled(how: str) -> None:
    script = Script()
    with inbox_of(script) as inbox:
        ids = inbox.send([HELLO], whole=False)
        stream = PieceStream(inbox, ids[0])
        batch = inbox.send([HELLO] * 3, whole=True)
        answers = CompletionStream(inbox, batch)
        if how == "left":
            script.say((ids[0], piece("x")), (batch[0], failed("bad")))
            next(stream), next(answers)
            batch = batch[1:]
        if how == "closed":
            stream.close(), answers.close()
        del stream, answers
        gc.collect()
        assert cancelled(script, 1 + len(batch)) == {*ids, *batch}


def test_what_cannot_travel_is_refused_alone_and_large_batches_travel_in_parts() -> None:
    script = Script()
    with inbox_of(script) as inbox:
        large = GenerationRequest("x" * 700_000)
        too_large = GenerationRequest("x" * 40_000_000)
        no_data: Any = GenerationRequest(lambda: None)  # type: ignore[arg-type]
        ids = inbox.send([no_data, too_large, large, large, HELLO], whole=True)
        assert [ticket.request_id for ticket in script.submitted] == ids[2:]
        answers = CompletionStream(inbox, ids)
        assert next(answers).error.startswith("a request must be made of texts, numbers")
        assert next(answers).error.startswith("a request must be at most 33554432 bytes, got 40000")


def test_the_end_of_the_deployment_ends_every_wait() -> None:
    script = Script()
    with inbox_of(script) as inbox:
        (a,) = inbox.send([HELLO], whole=False)
        (b,) = inbox.send([HELLO], whole=True)
        script.say((a, piece("", "error", "died")), (b, failed("died")), failure="target 0 died")
        stream = PieceStream(inbox, a)
        assert next(stream).finish_reason == "error"
        with pytest.raises(EngineError, match="target 0 died"):
            next(stream)
        with pytest.raises(EngineError, match="target 0 died"):
            next(CompletionStream(inbox, [b]))
        with pytest.raises(EngineError, match="target 0 died"):
            inbox.send([HELLO], whole=False)


@pytest.mark.parametrize("closed", [True, False])
def test_a_coordinator_that_does_not_answer_or_an_engine_that_is_closed_ends_every_wait(closed: bool) -> None:
    script = Script()
    with inbox_of(script) as inbox:
        stream = PieceStream(inbox, inbox.send([HELLO], whole=False)[0])
        if closed:
            inbox.close("the engine was closed")
        else:
            script.deliveries.put(EngineError("the Coordinator did not answer"))
        with pytest.raises(EngineError, match="the engine was closed" if closed else "did not answer"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_a_notice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    script = Script()
    with inbox_of(script) as inbox:
        (a,) = inbox.send([HELLO], whole=True)
        script.say((a, Notice("two of them")), (a, failed("x")))
        assert isinstance(next(CompletionStream(inbox, [a])), Completion)
        assert caplog.messages == ["two of them"]


class Answers(queue.SimpleQueue[Answer | EngineError]):
    """Somebody's box."""


def test_what_is_posted_is_sent_by_another_thread_and_cancelled_after_it_was_sent() -> None:
    script = Script()
    with inbox_of(script) as inbox:
        kept, dropped = Answers(), Answers()
        first = inbox.post(HELLO, kept)
        second = inbox.post(HELLO, dropped)
        inbox.drop([second])
        assert cancelled(script, 1) == {second}
        assert [ticket.request_id for ticket in script.submitted] == [first, second]
        script.say((second, piece("z")), (first, Refusal("no")), (first, piece("x", "stop")))
        assert kept.get(timeout=LIMIT_S) == Refusal("no")
        assert kept.get(timeout=LIMIT_S) == piece("x", "stop")
        assert dropped.empty()
        waits = Answers()
        inbox.post(HELLO, waits)
        script.say(failure="target 0 died")
        assert str(waits.get(timeout=LIMIT_S)) == "target 0 died"
        late = Answers()
        inbox.post(HELLO, late)
        assert str(late.get(timeout=LIMIT_S)) == "target 0 died"


def test_another_coordinator_gets_what_is_left_with_what_was_delivered_and_nobody_hears_anything_twice() -> (
    None
):
    script, other = Script(), Script()
    script.next.append(other)
    with inbox_of(script) as inbox:
        ids = inbox.send([HELLO] * 3, whole=False)
        done, cancelled_id, cut = ids
        (whole,) = inbox.send([HELLO], whole=True)
        streams = {name: PieceStream(inbox, name) for name in ids}
        account = RequestStats(num_rounds=7)
        script.say((done, piece("all", "stop")), (cut, piece("a")), (cut, replace(piece("b"), stats=account)))
        assert [next(streams[cut]).tokens, next(streams[cut]).tokens] == [(97,), (98,)]
        streams[cancelled_id].close()
        assert cancelled(script, 1) == {cancelled_id}
        script.deliveries.put(Delivery((), "", num_restarts=2))
        script.deliveries.put(CoordinatorLostError("died"))
        wait_until(lambda: len(other.submitted) == 2)
        assert [ticket.request_id for ticket in other.submitted] == [cut, whole]
        assert all(ticket.again for ticket in other.submitted)
        said = Delivered((97, 98), (Origin.TARGET,) * 2, account)
        assert [ticket.delivered for ticket in other.submitted] == [said, Delivered()]
        assert script.losses == [("died", True, 2)]
        (late,) = inbox.send([HELLO], whole=False)
        assert (other.submitted[-1].request_id, other.submitted[-1].again) == (late, False)
        other.say((cut, piece("c", "stop")), (whole, failed("x")))
        assert [p.tokens for p in streams[cut]] == [(99,)]
        assert next(CompletionStream(inbox, [whole])) == failed("x")
        assert [p.tokens for p in streams[done]] == [tuple(map(ord, "all"))]


def test_a_request_that_comes_while_there_is_no_coordinator_waits_for_the_next() -> None:
    script, other = Script(), Script()
    script.next.append(other)
    lost = threading.Event()

    def call(method: str, *args: Any) -> Any:
        if method == "submit":  # the first that notices
            lost.set()
            raise CoordinatorLostError("died")
        if method == "take":
            assert lost.wait(LIMIT_S)
            raise CoordinatorLostError("died")

    inbox = Inbox(call, script)
    stream = PieceStream(inbox, inbox.send([HELLO], whole=False)[0])
    wait_until(lambda: len(other.submitted) == 1)
    assert script.losses == [("died", False, 0)]
    other.say((other.submitted[0].request_id, piece("x", "stop")))
    assert [p.tokens for p in stream] == [(120,)]
    inbox.close("over")
    other.deliveries.put(EngineError("over"))


def test_where_there_is_no_other_coordinator_all_who_wait_read_why() -> None:
    script = Script()
    with inbox_of(script) as inbox:
        stream = PieceStream(inbox, inbox.send([HELLO], whole=False)[0])
        script.deliveries.put(CoordinatorLostError("died"))
        with pytest.raises(EngineError, match=r"^died; no other one$"):
            next(stream)
        with pytest.raises(EngineError, match=r"^died; no other one$"):
            inbox.send([HELLO], whole=False)


def test_what_is_wrong_with_ray_itself_ends_every_wait() -> None:
    script = Script()
    with inbox_of(script) as inbox:
        stream = PieceStream(inbox, inbox.send([HELLO], whole=False)[0])
        script.wrong = "Ray's head has ended"
        script.say()
        with pytest.raises(EngineError, match="Ray's head has ended"):
            next(stream)


def test_workers_that_are_wanted_are_created_and_given() -> None:
    script = Script()
    with inbox_of(script):
        script.deliveries.put(Delivery((), "", wanted=("draft", "target 1")))
        assert script.given.get(timeout=LIMIT_S) == {"draft": "a new draft", "target 1": "a new target 1"}
