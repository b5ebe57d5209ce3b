"""The requests of a deployment, from their arrival to the last token: what the Coordinator knows of each."""

from collections.abc import Callable
from dataclasses import replace

from outrider.cluster.api import Answer, Collector, Piece, Refusal, Segment, Ticket
from outrider.cluster.text import TextAssembler
from outrider.workers.answer import PER_TOKEN, Completion, output_fields
from outrider.workers.sequences.sequence import Request, TokenEvent


class OpenRequest:
    """One request that was admitted: its text so far and, if it wants the whole answer, what that will be."""

    def __init__(self, request: Request, text: TextAssembler, whole: bool) -> None:
        self.id = request.id
        self.num_prompt_tokens = len(request.prompt_tokens)
        self.text = text
        self.answer = Collector() if whole else None
        self.sent = False  # the DraftWorker has it
        self.cancelled = False
        self.stats = request.stats
        self._request = request
        self._tokens: list[int] = []

    def note(self, event: TokenEvent) -> None:
        """This came out of the DraftWorker."""
        self._tokens += event.tokens
        self.stats = event.stats

    def rest(self) -> Request:
        """What is left to do of the request."""
        return replace(self._request, output_tokens=tuple(self._tokens), stats=self.stats)


class RequestTable:
    """Takes tickets, then TokenEvents; gives answers. Belongs to one event loop.

    put: takes the answers, with their requests' ids.
    cancel: tells the DraftWorker that a request ended here. It must not block.
    """

    def __init__(self, put: Callable[[str, Answer], None], cancel: Callable[[str], None]) -> None:
        self._put = put
        self._cancel = cancel
        self._waiting: dict[str, Ticket] = {}
        self._open: dict[str, OpenRequest] = {}

    @property
    def num_open(self) -> int:
        """Requests that have no last answer yet, those at the door included."""
        return len(self._waiting) + len(self._open)

    def arrive(self, ticket: Ticket) -> None:
        """A request comes to the door."""
        assert ticket.request_id not in self._waiting, ticket.request_id
        assert ticket.request_id not in self._open, ticket.request_id
        self._waiting[ticket.request_id] = ticket

    def is_waiting(self, request_id: str) -> bool:
        """Whether it is at the door still: neither admitted nor refused, cancelled or failed."""
        return request_id in self._waiting

    def refuse(self, ticket: Ticket, refusal: Refusal) -> None:
        """Ends a request that cannot be run, whether it had arrived or not."""
        self._waiting.pop(ticket.request_id, None)
        failed = Completion(finish_reason="error", error=refusal.error)
        self._put(ticket.request_id, failed if ticket.whole else refusal)

    def admit(self, request: Request, text: TextAssembler) -> None:
        """A waiting request is about to be sent to the DraftWorker."""
        ticket = self._waiting.pop(request.id)
        self._open[request.id] = OpenRequest(request, text, ticket.whole)

    def note_sent(self, request_id: str) -> None:
        """The DraftWorker has it, and can be told to cancel it."""
        entry = self._open.get(request_id)
        if entry is not None:
            entry.sent = True
            if entry.cancelled:
                self._cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """Ends a request early, wherever it is; unknown ids are ignored."""
        ticket = self._waiting.pop(request_id, None)
        entry = self._open.get(request_id)
        if ticket is not None:
            self._end(ticket, "cancelled", "")
        elif entry is not None:
            entry.cancelled = True
            if entry.sent:
                self._cancel(request_id)

    def resume(self) -> list[Request]:
        """The DraftWorker is another one, which knows nothing: what is left to do of every request, in order.

        Those that only waited for their last event end here.
        """
        for entry in list(self._open.values()):
            entry.sent = False
            if entry.text.stopped or entry.cancelled:
                reason = "stop" if entry.text.stopped else "cancelled"
                self._add(entry, _last_piece(entry, reason))
        return [entry.rest() for entry in self._open.values()]

    def deliver(self, event: TokenEvent) -> None:
        """What a round gave to one request. Events of requests that are no longer here are dropped."""
        entry = self._open.get(event.request_id)
        if entry is None:
            return
        entry.note(event)
        was_stopped = entry.text.stopped
        segments, num_kept = _append(entry, event)
        stopped = entry.text.stopped
        if event.finish_reason:
            segments += entry.text.finish()
        elif stopped and not was_stopped:
            # The last piece waits for the DraftWorker's last event, which carries the final counts.
            self._cancel(event.request_id)
        reason = "stop" if stopped and event.finish_reason in ("cancelled", "length") else event.finish_reason
        if not (num_kept or segments or reason):
            return
        kept = {name: getattr(event, name)[:num_kept] for name in PER_TOKEN}
        tree = replace(event.tree, accepted=event.tree.accepted[:num_kept])
        said = output_fields(event) | kept | {"tree": tree, "finish_reason": reason}
        self._add(entry, Piece(**said, segments=tuple(segments), num_prompt_tokens=entry.num_prompt_tokens))

    def fail(self, request_id: str, reason: str) -> None:
        """Ends one admitted request with an error; what it has is kept."""
        entry = self._open.get(request_id)
        if entry is not None:
            self._add(entry, _last_piece(entry, "error", reason))

    def fail_all(self, reason: str) -> None:
        """The deployment broke: every request ends with this error."""
        for ticket in self._waiting.values():
            self._end(ticket, "error", reason)
        self._waiting.clear()
        for request_id in list(self._open):
            self.fail(request_id, reason)

    def _add(self, entry: OpenRequest, piece: Piece) -> None:
        if piece.finish_reason:
            del self._open[entry.id]
        if entry.answer is None:
            self._put(entry.id, piece)
            return
        entry.answer.add(piece)
        if piece.finish_reason:
            self._put(entry.id, entry.answer.completion())

    def _end(self, ticket: Ticket, reason: str, error: str) -> None:
        """The only answer to a request that was never admitted."""
        kind = Completion if ticket.whole else Piece
        self._put(ticket.request_id, kind(finish_reason=reason, error=error))


def _last_piece(entry: OpenRequest, reason: str, error: str = "") -> Piece:
    """The end of a request without a word of the DraftWorker."""
    return Piece(
        segments=tuple(entry.text.finish()),
        finish_reason=reason,
        error=error,
        stats=entry.stats,
        num_prompt_tokens=entry.num_prompt_tokens,
    )


def _append(entry: OpenRequest, event: TokenEvent) -> tuple[list[Segment], int]:
    """Adds the event's tokens to the text, up to one that completes a stop string; how many were kept."""
    segments: list[Segment] = []
    num_kept = 0
    for token, origin in zip(event.tokens, event.origins, strict=True):
        if entry.text.stopped:
            break
        segments += entry.text.add(token, origin)
        num_kept += 1
    return segments, num_kept
