"""The client's end of the mailbox: answers are fetched by one thread and handed to those who wait for them."""

import contextlib
import logging
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from outrider.cluster.api import (
    Answer,
    CoordinatorLostError,
    Delivery,
    EngineError,
    GenerationRequest,
    Notice,
    Piece,
    Refusal,
    Ticket,
)
from outrider.cluster.journal import Journal
from outrider.workers.answer import Completion

MAX_REQUEST_BYTES = 32 * 2**20  # pickled; a million token ids are 5 MB
_BATCH_BYTES = 2**20  # of tickets that travel in one call
_TAKE_S = 2.0

_log = logging.getLogger("outrider")

Call = Callable[..., Any]
"""`call(method, *args)`: a method of the Coordinator; raises ValueError and EngineError."""


class Household(Protocol):
    """What the client's process does for the Coordinator."""

    def complaint(self) -> str:
        """Why nothing can come any longer, whatever the Coordinator says; empty where all is well."""

    def successor(self, reason: str, answered: bool, num_restarts: int) -> Call:
        """Calls another Coordinator from now on, in place of one that was lost for this reason.

        answered: whether a token came from that one. num_restarts: of workers and Coordinators before. Raises
        EngineError where there is none.
        """

    def provide(self, names: Sequence[str]) -> Mapping[str, Any]:
        """Creates workers of these names."""


class _Resume:
    """Among what is to be sent: all that another Coordinator left."""


class Box(Protocol):
    """Where the answers to one request go. `put` is called in another thread, and must not block."""

    def put(self, answer: Answer | EngineError, /) -> None: ...


class Inbox:
    """Sends requests and receives their answers. Its methods may be called from any thread.

    A Coordinator that is lost has a successor, who gets what the other one left with what was delivered of it: the
    answers go on.
    """

    def __init__(self, call: Call, household: Household) -> None:
        self.failure = ""  # why nothing comes any longer
        self.restarting = ""  # why nothing comes for now
        self._journal = Journal()
        self._lock = threading.Lock()
        self._call, self._number = call, 0  # of the Coordinator; under the lock, both together
        self._household = household
        self._answered = False
        self._num_restarts = 0
        self._boxes: dict[str, Box] = {}
        # Tickets to send and ids to cancel, in order. All that a finalizer may touch: putting never blocks.
        self._outgoing: SimpleQueue[Ticket | str | _Resume | None] = SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._fetch, self._send_later)]
        for thread in self._threads:
            thread.start()

    def send(self, requests: Sequence[GenerationRequest], whole: bool) -> list[str]:
        """Sends requests; their answers come out of `get` by the ids that are returned, in the same order.

        A request that cannot be sent is refused like one that cannot be run. Raises EngineError.
        """
        ids = []
        batch: list[Ticket] = []
        try:
            for asked in requests:
                request_id = uuid.uuid4().hex
                ids.append(request_id)
                self._boxes[request_id] = SimpleQueue()
                try:
                    batch.append(Ticket(request_id, _packed(asked), whole))
                except ValueError as error:
                    reason = str(error)
                    refused = Completion(finish_reason="error", error=reason) if whole else Refusal(reason)
                    self._boxes[request_id].put(refused)
                if sum(len(ticket.contents) for ticket in batch) > _BATCH_BYTES:
                    self._submit(batch)
                    batch = []
            self._submit(batch)
        except BaseException:
            self.drop(ids)
            raise
        return ids

    def post(self, asked: GenerationRequest, box: Box) -> str:
        """Sends a request soon, by another thread, and returns its id: for callers that must not wait.

        Its answers go into `box`; an EngineError where none will come. Raises ValueError for what cannot be sent.
        """
        ticket = Ticket(uuid.uuid4().hex, _packed(asked), whole=False)
        self._boxes[ticket.request_id] = box
        self._outgoing.put(ticket)
        if self.failure:  # the thread that would have said so may have looked before
            box.put(EngineError(self.failure))
        return ticket.request_id

    def get(self, request_id: str) -> Answer:
        """The next answer to a request of `send`, waiting for it. Raises EngineError when none will come."""
        box = self._boxes[request_id]
        assert isinstance(box, SimpleQueue)
        answer: Answer | EngineError = box.get()
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def finish(self, request_id: str) -> None:
        """The last answer to this request was taken."""
        self._boxes.pop(request_id, None)

    def drop(self, request_ids: Sequence[str]) -> None:
        """Nobody waits for these any longer: they are cancelled, later, by another thread."""
        for request_id in request_ids:
            if self._boxes.pop(request_id, None) is not None and not self._closed:
                self._outgoing.put(request_id)

    def close(self, reason: str) -> None:
        """Whoever waits gets EngineError with this reason."""
        self._closed = True
        self._break(reason)
        self._outgoing.put(None)

    def _submit(self, batch: list[Ticket]) -> None:
        if self.failure:
            raise EngineError(self.failure)
        if not batch:
            return
        with self._lock:
            self._journal.enter(batch, self._number)
            call = self._call
        # One that is lost has a successor, who gets these too; where there is none, all who wait are told.
        with contextlib.suppress(CoordinatorLostError):
            call("submit", batch)

    def _resume(self) -> None:
        with self._lock:
            call, left = self._call, self._journal.left_by_others(self._number)
        with contextlib.suppress(EngineError):  # which all who wait get to know from `take`
            while left:
                num_bytes, num = 0, 0
                while num < len(left) and num_bytes <= _BATCH_BYTES:
                    num_bytes, num = num_bytes + len(left[num].contents), num + 1
                call("submit", left[:num])
                left = left[num:]

    def _break(self, reason: str) -> None:
        self.failure = self.failure or reason
        for box in list(self._boxes.values()):
            box.put(EngineError(self.failure))

    def _fetch(self) -> None:
        while not self._closed:
            if complaint := self._household.complaint():
                self._break(complaint)
                return
            try:
                delivery: Delivery = self._call("take", _TAKE_S)
                if delivery.wanted:
                    self._call("give", self._household.provide(delivery.wanted))
            except CoordinatorLostError as error:
                if self._succeed(str(error)):
                    continue
                return
            except Exception as error:
                # Whatever ended this thread, those who wait get to know.
                self._break(
                    str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
                )
                return
            self._num_restarts = delivery.num_restarts
            self.failure = self.failure or delivery.failure
            self._note_restarting(delivery.restarting)
            for request_id, answer in delivery.answers:
                self._journal.note(request_id, answer)
                self._answered |= isinstance(answer, Piece | Completion) and bool(answer.tokens)
                if isinstance(answer, Notice):
                    _log.warning(answer.text)
                elif (box := self._boxes.get(request_id)) is not None:
                    box.put(answer)
            if delivery.failure:
                # Each request has had its last answer; this is for those that come now.
                self._break(delivery.failure)
                return

    def _succeed(self, reason: str) -> bool:
        """Another Coordinator goes on, or this is the end."""
        self._note_restarting(reason)
        try:
            call = self._household.successor(reason, self._answered, self._num_restarts)
        except Exception as error:
            # Whatever keeps it from coming, those who wait get to know.
            self._break(str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}")
            return False
        with self._lock:
            self._call, self._number = call, self._number + 1
        self._answered, self._num_restarts = False, self._num_restarts + 1
        self._outgoing.put(_Resume())
        return True

    def _note_restarting(self, restarting: str) -> None:
        if restarting and restarting != self.restarting:
            _log.warning("workers are started again, answers go on then: %s", restarting)
        elif self.restarting and not restarting:
            _log.warning("all workers stand again")
        self.restarting = restarting

    def _send_later(self) -> None:
        while (first := self._outgoing.get()) is not None:
            waiting, num_bytes = [first], _size(first)
            with contextlib.suppress(Empty):
                while num_bytes <= _BATCH_BYTES:
                    further = self._outgoing.get_nowait()
                    if further is None:
                        return
                    waiting.append(further)
                    num_bytes += _size(further)
            if any(isinstance(item, _Resume) for item in waiting):
                self._resume()
            # A request is cancelled after it was sent, never before.
            tickets = [item for item in waiting if isinstance(item, Ticket)]
            try:
                self._submit(tickets)
            except (EngineError, ValueError) as error:
                for ticket in tickets:
                    if (box := self._boxes.get(ticket.request_id)) is not None:
                        box.put(EngineError(str(error)))
            cancelled = [item for item in waiting if isinstance(item, str)]
            if cancelled:
                self._journal.strike(cancelled)
                with contextlib.suppress(EngineError, ValueError):  # nothing runs any longer
                    self._call("cancel", cancelled)


class PieceStream(Iterator[Piece]):
    """The answer to one request, piece by piece. Closed or dropped before its end, it cancels the request."""

    def __init__(self, inbox: Inbox, request_id: str) -> None:
        self._inbox = inbox
        self._id = request_id
        self._last: Piece | None = None
        self._finished = False

    def __next__(self) -> Piece:
        if self._finished:
            last, self._last = self._last, None
            if last is not None and last.finish_reason == "error" and self._inbox.failure:
                raise EngineError(self._inbox.failure)
            raise StopIteration
        try:
            answer = self._inbox.get(self._id)
        except EngineError:
            self._finish()
            raise
        if isinstance(answer, Refusal):
            self._finish()
            raise answer.raised()
        assert isinstance(answer, Piece), answer
        if answer.finish_reason:
            self._last = answer
            self._finish()
        return answer

    def close(self) -> None:
        """Cancels the request unless it has ended. May be called again."""
        self._finished = True
        self._inbox.drop([self._id])

    def __del__(self) -> None:
        self.close()

    def _finish(self) -> None:
        self._finished = True
        self._inbox.finish(self._id)


class CompletionStream(Iterator[Completion]):
    """Whole answers in the order of their requests. Closed or dropped, it cancels those that still run."""

    def __init__(self, inbox: Inbox, request_ids: Sequence[str]) -> None:
        self._inbox = inbox
        self._ids = list(request_ids)
        self._num_done = 0

    def __next__(self) -> Completion:
        if self._num_done == len(self._ids):
            raise StopIteration
        try:
            answer = self._inbox.get(self._ids[self._num_done])
        except EngineError:
            self.close()
            raise
        assert isinstance(answer, Completion), answer
        if answer.finish_reason == "error" and self._inbox.failure:
            self.close()
            raise EngineError(self._inbox.failure)
        self._inbox.finish(self._ids[self._num_done])
        self._num_done += 1
        return answer

    def close(self) -> None:
        """Cancels the requests whose answers were not taken. May be called again."""
        self._inbox.drop(self._ids[self._num_done :])
        self._num_done = len(self._ids)

    def __del__(self) -> None:
        self.close()


def _size(outgoing: Ticket | str | _Resume) -> int:
    """In bytes, as far as it counts."""
    return len(outgoing.contents) if isinstance(outgoing, Ticket) else 0


def _packed(asked: GenerationRequest) -> bytes:
    """As it travels. Raises ValueError for what cannot."""
    try:
        contents = pickle.dumps(asked)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(
            "a request must be made of texts, numbers, lists and mappings, "
            f"got something else in {type(asked).__name__}: {error}"
        ) from error
    if len(contents) > MAX_REQUEST_BYTES:
        raise ValueError(f"a request must be at most {MAX_REQUEST_BYTES} bytes, got {len(contents)}")
    return contents
