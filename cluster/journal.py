"""What another Coordinator needs to know where one is lost: the requests that it had, and what came of them.

It is kept by the client, in memory: a client that is gone has nobody to answer, and its workers go with it.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from outrider.cluster.api import Answer, Delivered, Notice, Piece, Ticket
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import RequestStats


@dataclass
class _Entry:
    ticket: Ticket
    coordinator: int  # which one has it
    tokens: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    stats: RequestStats = field(default_factory=RequestStats)

    def rest(self) -> Ticket:
        """For another Coordinator."""
        delivered = Delivered(tuple(self.tokens), tuple(self.origins), self.stats)
        return replace(self.ticket, again=True, delivered=delivered)


class Journal:
    """Requests without a last answer, in order. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    def enter(self, tickets: Sequence[Ticket], coordinator: int) -> None:
        """These are about to be sent to the Coordinator of this number."""
        with self._lock:
            self._entries.update((ticket.request_id, _Entry(ticket, coordinator)) for ticket in tickets)

    def note(self, request_id: str, answer: Answer) -> None:
        """This was delivered."""
        with self._lock:
            entry = self._entries.get(request_id)
            if entry is None or isinstance(answer, Notice):
                return
            if not isinstance(answer, Piece) or answer.finish_reason:
                del self._entries[request_id]
                return
            entry.tokens += answer.tokens
            entry.origins += answer.origins
            entry.stats = answer.stats

    def strike(self, request_ids: Sequence[str]) -> None:
        """Nobody waits for these any longer."""
        with self._lock:
            for request_id in request_ids:
                self._entries.pop(request_id, None)

    def left_by_others(self, coordinator: int) -> list[Ticket]:
        """What Coordinators before the one of this number have left, in order; from now on it is that one's."""
        with self._lock:
            left = [entry for entry in self._entries.values() if entry.coordinator < coordinator]
            for entry in left:
                entry.coordinator = coordinator
            return [entry.rest() for entry in left]
