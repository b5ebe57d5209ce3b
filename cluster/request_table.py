"""The requests of a deployment, from their arrival to the last token: what the Coordinator knows of each."""

import time
from collections.abc import Callable

from outrider.cluster.api import Answer, Completion, Piece, Refusal, Segment, Ticket, failed_completion
from outrider.cluster.text import TextAssembler
from outrider.workers.sequences.sequence import Request, RequestStats, TokenEvent


class OpenRequest:
    """One request that was admitted: its text so far and, if it wants the whole answer, its pieces."""

    def __init__(self, request: Request, text: TextAssembler, whole: bool) -> None:
        self.id = request.id
        self.num_prompt_tokens = len(request.prompt_tokens)
        self.text = text
        self.whole = whole
        self.sent = False  # the DraftWorker has it
        self.cancelled = False  # before it was sent
        self.pieces: list[Piece] = []
        self.start_s = time.monotonic()
        self.token_times_s: list[float] = []


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

    def refuse(self, ticket: Ticket, error: str) -> None:
        """Ends a request that cannot be run, whether it had arrived or not."""
        self._waiting.pop(ticket.request_id, None)
        self._put(ticket.request_id, failed_completion(error) if ticket.whole else Refusal(error))

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
            self._give(ticket.request_id, ticket.whole, _last_piece((), "cancelled", ""))
        elif entry is not None and entry.sent:
            self._cancel(request_id)
        elif entry is not None:
            entry.cancelled = True

    def deliver(self, event: TokenEvent) -> None:
        """What a round gave to one request. Events of requests that are no longer here are dropped."""
        entry = self._open.get(event.request_id)
        if entry is None:
            return
        was_stopped = entry.text.stopped
        segments, num_kept = _append(entry, event)
        stopped = entry.text.stopped
        if event.finish_reason:
            segments += entry.text.finish()
        elif stopped and not was_stopped:
            # The last piece waits for the DraftWorker's last event, which carries the final counts.
            self._cancel(event.request_id)
        entry.token_times_s += [time.monotonic() - entry.start_s] * num_kept
        reason = "stop" if stopped and event.finish_reason in ("cancelled", "length") else event.finish_reason
        if not (num_kept or segments or reason):
            return
        piece = Piece(
            segments=tuple(segments),
            tokens=event.tokens[:num_kept],
            origins=event.origins[:num_kept],
            logprobs=event.logprobs[:num_kept],
            finish_reason=reason,
            error=event.error,
            stats=event.stats,
        )
        self._add(entry, piece)

    def fail(self, request_id: str, reason: str) -> None:
        """Ends one admitted request with an error; what it has is kept."""
        entry = self._open.get(request_id)
        if entry is not None:
            self._add(entry, _last_piece(tuple(entry.text.finish()), "error", reason))

    def fail_all(self, reason: str) -> None:
        """The deployment broke: every request ends with this error."""
        for ticket in self._waiting.values():
            self._give(ticket.request_id, ticket.whole, _last_piece((), "error", reason))
        self._waiting.clear()
        for request_id in list(self._open):
            self.fail(request_id, reason)

    def _add(self, entry: OpenRequest, piece: Piece) -> None:
        if piece.finish_reason:
            del self._open[entry.id]
        if not entry.whole:
            self._put(entry.id, piece)
            return
        entry.pieces.append(piece)
        if piece.finish_reason:
            self._put(entry.id, _completion(entry))

    def _give(self, request_id: str, whole: bool, piece: Piece) -> None:
        """The only piece of a request that was never admitted."""
        if whole:
            self._put(request_id, failed_completion(piece.error, piece.finish_reason))
        else:
            self._put(request_id, piece)


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


def _last_piece(segments: tuple[Segment, ...], reason: str, error: str) -> Piece:
    return Piece(segments, (), (), (), reason, error, RequestStats())


def _completion(entry: OpenRequest) -> Completion:
    pieces, last = entry.pieces, entry.pieces[-1]
    return Completion(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        origins=tuple(origin for piece in pieces for origin in piece.origins),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        token_times_s=tuple(entry.token_times_s),
        finish_reason=last.finish_reason,
        error=last.error,
        num_prompt_tokens=entry.num_prompt_tokens,
        stats=last.stats,
        total_s=time.monotonic() - entry.start_s,
    )
