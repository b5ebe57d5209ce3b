"""Drafting ahead that does not depend on how fast this machine is."""

from __future__ import annotations

from outrider.workers.drafting.method import DraftMethod
from outrider.workers.sequences.tree import Ints
from support.local_engine import LocalEngine


class AheadSpy:
    """Says of every round's scores once that they are not there yet, and counts the draft steps taken meanwhile."""

    def __init__(self, engine: LocalEngine) -> None:
        self.num_steps = 0
        self._drafting = engine.drafting
        self._expand, self._poll, self._receive = (
            engine.drafting.expand,
            engine.loop._link.poll,
            engine.loop._link.receive,
        )
        self._was_asked = False
        engine.drafting.expand = self.expand  # type: ignore[method-assign]
        engine.loop._link.poll = self.poll  # type: ignore[method-assign]
        engine.loop._link.receive = self.receive  # type: ignore[method-assign]

    def expand(self, method: DraftMethod, slots: Ints, num_further: int = 0) -> int:
        num_steps = self._expand(method, slots, num_further)
        is_ahead = any(self._drafting.slots.sequence(s).in_flight for s in slots.tolist())
        self.num_steps += num_steps * is_ahead
        return num_steps

    def poll(self) -> bool:
        was_asked, self._was_asked = self._was_asked, True
        return was_asked and self._poll()

    def receive(self):  # type: ignore[no-untyped-def]
        self._was_asked = False
        return self._receive()
