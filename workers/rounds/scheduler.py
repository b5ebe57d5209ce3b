"""Which sequences run in which lane, what part of a prompt each round reads, and who holds KV pages.

Knows nothing of models or messages' bytes: it turns requests into planned steps and verdicts into pages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from outrider.workers.link.messages import MAX_STARTS_PER_ROUND
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.sequence import Request, Sequence
from outrider.workers.sequences.tree import GrowingTree


@dataclass(frozen=True)
class SchedulerLimits:
    """From the configuration; all counts."""

    max_sequences: int
    max_round_tokens: int
    prefill_chunk: int


@dataclass(frozen=True)
class PlannedStep:
    """A sequence takes part in a round with this many of its uncommitted tokens (the chain)."""

    sequence: Sequence
    chain_length: int

    @property
    def reaches_end(self) -> bool:
        """The chain ends at the last known token, so the target samples and a draft tree may follow."""
        return self.chain_length == self.sequence.num_uncommitted


class Scheduler:
    """Sequences wait, run in a lane, and finish. When pages run out the newest one is computed again later."""

    def __init__(self, limits: SchedulerLimits, pool: PagePool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.released_slots: list[int] = []  # the target hears of them with the next message
        self._free_slots = list(range(limits.max_sequences))[::-1]

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, request: Request) -> None:
        """Queue a request. The caller has checked that it fits into the KV cache alone."""
        tokens = list(request.prompt_tokens)
        self.waiting.append(Sequence(request, tokens, tree=GrowingTree(tokens[-1], len(tokens) - 1)))

    def find(self, request_id: str) -> Sequence | None:
        """The waiting or running sequence of a request."""
        return next((s for s in [*self.running, *self.waiting] if s.id == request_id), None)

    def assign_lanes(self, num_lanes: int) -> list[Sequence]:
        """Admit waiting sequences, spread what is not in flight over `num_lanes`; returns the admitted ones."""
        admitted: list[Sequence] = []
        while self.waiting and self._can_admit(self.waiting[0]) and len(admitted) < MAX_STARTS_PER_ROUND:
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            # The last token is always computed: its hidden state gives the next one.
            sequence.pages = self.pool.share_prefix(sequence.tokens, len(sequence.tokens) - 1)
            sequence.num_pages_remembered = len(sequence.pages)
            sequence.num_committed = len(sequence.pages) * self.pool.page_size
            if not sequence.num_output:
                sequence.stats = replace(sequence.stats, num_cached_prompt_tokens=sequence.num_committed)
            sequence.lane = self._smallest_lane(num_lanes)
            self.running.append(sequence)
            admitted.append(sequence)
        movable = [s for s in reversed(self.running) if not s.in_flight]
        for sequence in movable:
            smallest = self._smallest_lane(num_lanes)
            size_here, size_there = self._lane_size(sequence.lane), self._lane_size(smallest)
            if sequence.lane >= num_lanes or size_here > size_there + 1:
                sequence.lane = smallest
        return admitted

    def plan(self, lane: int) -> list[PlannedStep]:
        """Choose the steps of a lane's next round, oldest sequence first, with pages for their chains."""
        steps: list[PlannedStep] = []
        rows_left = self.limits.max_round_tokens
        prefill_left = self.limits.prefill_chunk
        starts_left = MAX_STARTS_PER_ROUND
        for sequence in [s for s in self.running if s.lane == lane and not s.in_flight]:
            if sequence not in self.running:  # its pages went to an older one just now
                continue
            is_prefill = sequence.num_uncommitted > 1
            length = min(sequence.num_uncommitted, prefill_left, rows_left) if is_prefill else 1
            if length <= 0 or rows_left <= 0 or (not sequence.started and starts_left == 0):
                continue
            if not self._take_pages(sequence, sequence.num_committed + length):
                continue
            starts_left -= 0 if sequence.started else 1
            rows_left -= length
            prefill_left -= length if is_prefill else 0
            steps.append(PlannedStep(sequence, length))
        return steps

    def tree_room(self, step: PlannedStep) -> int:
        """Draft nodes for which this sequence can have KV rows now, without taking pages from anybody."""
        sequence = step.sequence
        rows = (len(sequence.pages) + self.pool.num_available) * self.pool.page_size
        return max(0, rows - sequence.num_committed - step.chain_length)

    def take_tree_pages(self, step: PlannedStep, num_nodes: int) -> None:
        """Hold pages for `num_nodes` draft nodes behind the chain; `tree_room` said that they are there."""
        sequence = step.sequence
        rows = sequence.num_committed + step.chain_length + num_nodes
        missing = self.pool.pages_for(rows) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self.pool.allocate(missing)

    def commit_sent(self, sequence: Sequence) -> None:
        """The message that commits `num_committed` rows is under way: later messages may share these pages."""
        known = sequence.tokens[: sequence.num_committed]
        sequence.num_pages_remembered = self.pool.remember_prefix(
            sequence.pages, known, sequence.num_pages_remembered
        )

    def finish(self, sequence: Sequence) -> None:
        """Free the slot and the pages of a sequence that is not in flight."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def _can_admit(self, sequence: Sequence) -> bool:
        if not self._free_slots:
            return False
        if not self.running:
            return True
        # Room for the next chunk and one page for everybody who runs; less would take pages back at once.
        chunk = min(len(sequence.tokens), self.limits.prefill_chunk)
        return self.pool.num_available >= self.pool.pages_for(chunk) + len(self.running)

    def _take_pages(self, sequence: Sequence, num_rows: int) -> bool:
        missing = self.pool.pages_for(num_rows) - len(sequence.pages)
        while missing > self.pool.num_available:
            newer = [s for s in self.running[self.running.index(sequence) + 1 :] if not s.in_flight]
            if newer:
                self._recompute_later(newer[-1])
            else:
                # Everybody newer is in flight, or nobody is newer and the older ones need their pages.
                holds_all = len(self.running) == 1
                assert not holds_all, "a request larger than the KV cache was let in"
                return False
        if missing > 0:
            sequence.pages += self.pool.allocate(missing)
        return True

    def _recompute_later(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.stats = replace(sequence.stats, num_recomputed=sequence.stats.num_recomputed + 1)
        sequence.pending_accepted = ()
        sequence.num_committed = sequence.num_pages_sent = sequence.num_pages_remembered = 0
        sequence.started = False
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert not sequence.in_flight
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []
        self._free_slots.append(sequence.slot)
        if sequence.started:
            self.released_slots.append(sequence.slot)

    def _lane_size(self, lane: int) -> int:
        return sum(s.lane == lane for s in self.running)

    def _smallest_lane(self, num_lanes: int) -> int:
        return min(range(num_lanes), key=lambda lane: (self._lane_size(lane), lane))
