"""Which sequences run in which lane, what part of a prompt each round reads, and who holds KV pages.

Knows nothing of models or messages' bytes: it turns requests into planned steps and verdicts into pages.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from outrider.workers.link.messages import MAX_STARTS_PER_ROUND
from outrider.workers.sequences.pages import PagePool, Prefix, num_unseen_pages
from outrider.workers.sequences.sequence import Request, Sequence

_ROUNDS_TO_HALVE = 4  # of waiting, for which a prompt counts as half as long


def precedence(num_left: int, since_round: int) -> float:
    """Of all prompts that wait, the one for which this is least is read first.

    A prompt with `num_left` tokens left counts as half as long for every four rounds of waiting: this is the log2
    of that, but for the present round's number, which is the same for all, so that an order once found stands.
    Among those that wait alike the shortest goes first, which gives the least mean time to a first token (shortest
    remaining time first); one that is r times as long goes before those that come more than 4 log2(r) rounds
    later, so nobody waits for ever.
    """
    return math.log2(num_left) + since_round / _ROUNDS_TO_HALVE


def whole_prefix(sequence: Sequence) -> int:
    """All tokens of a prefix may be shared: nothing else is kept for them that would be missing."""
    return len(sequence.tokens)


@dataclass(frozen=True)
class SchedulerLimits:
    """From the configuration; all counts.

    `window` is the target's widest (`ModelConfig.widest_window`): pages that it has left behind are given back while
    their sequence runs. 0 where some layer sees everything: pages hold the rows of all layers, so a model whose
    layers differ keeps all of them, those of its windowed layers included.
    """

    max_sequences: int
    max_round_tokens: int
    prefill_chunk: int
    window: int = 0


class PlannedStep(NamedTuple):
    """A sequence takes part in a round with this many of its uncommitted tokens (the chain)."""

    sequence: Sequence
    chain_length: int

    @property
    def reaches_end(self) -> bool:
        """The chain ends at the last known token, so the target samples and a draft tree may follow."""
        return self.chain_length == self.sequence.num_uncommitted


class Scheduler:
    """Sequences wait, run in a lane, and finish. When pages run out the newest one is computed again later.

    `prefix_kept` says of a sequence about to run how many of its first tokens may come from shared pages, because
    everybody who keeps something for each token, such as a draft method, still has it for these. `on_leave` hears of
    a sequence that is about to lose its slot.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        pool: PagePool,
        prefix_kept: Callable[[Sequence], int] = whole_prefix,
        on_leave: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.limits = limits
        self.pool = pool
        self._on_leave = on_leave
        self.waiting: list[Sequence] = []  # the next to run first
        self.released_slots: list[int] = []  # the target hears of them with the next message
        self._prefix_kept = prefix_kept
        self._running: dict[str, Sequence] = {}  # oldest first
        self._unfinished: dict[str, Sequence] = {}
        self._lane_sizes: Counter[int] = Counter()
        self._free_slots = list(range(limits.max_sequences))[::-1]
        self._num_rounds = 0
        self._num_arrived = 0
        self._num_admitted = 0

    @property
    def running(self) -> Collection[Sequence]:
        """Those with a slot, oldest first."""
        return self._running.values()

    @property
    def is_idle(self) -> bool:
        return not self._unfinished

    def submit(self, request: Request) -> None:
        """Queue a request. The caller has checked that it fits into the KV cache alone."""
        assert request.id not in self._unfinished, f"request {request.id} was submitted twice"
        tokens = [*request.prompt_tokens, *request.output_tokens]
        sequence = Sequence(request, tokens, stats=request.stats)
        sequence.arrival, sequence.waiting_since = self._num_arrived, self._num_rounds
        self._num_arrived += 1
        self._unfinished[request.id] = sequence
        insort(self.waiting, sequence, key=_place_in_line)

    def find(self, request_id: str) -> Sequence | None:
        """The waiting or running sequence of a request."""
        return self._unfinished.get(request_id)

    def assign_lanes(self, num_lanes: int) -> list[Sequence]:
        """Admit waiting sequences, spread what is not in flight over `num_lanes`; returns the admitted ones."""
        admitted: list[Sequence] = []
        while self.waiting and self._can_admit(self.waiting[0]) and len(admitted) < MAX_STARTS_PER_ROUND:
            sequence = self.waiting.pop(0)
            self._admit(sequence, self._smallest_lane(num_lanes))
            admitted.append(sequence)
        sizes = [self._lane_sizes[lane] for lane in range(num_lanes)]
        if max(sizes) - min(sizes) > 1 or sum(sizes) < len(self._running):
            self._spread(num_lanes)
        return admitted

    def plan(self, lane: int) -> list[PlannedStep]:
        """Choose the steps of a lane's next round, oldest sequence first, with pages for their chains.

        Whoever decodes takes part; prompts share `prefill_chunk` in the order of `precedence`.
        """
        idle = [s for s in self._running.values() if s.lane == lane and not s.in_flight]
        lengths = self._chain_lengths(idle)
        evictable = [s for s in self._running.values() if not s.in_flight]
        steps: list[PlannedStep] = []
        for sequence in idle:
            length = lengths.get(sequence.id, 0)
            if length == 0 or sequence.id not in self._running:  # its pages may have gone to an older one
                continue
            if not self._take_pages(sequence, sequence.num_committed + length, evictable):
                continue
            step = PlannedStep(sequence, length)
            # A prompt that was given only what others left over goes on waiting.
            if step.reaches_end or 2 * length >= self.limits.prefill_chunk:
                sequence.waiting_since = self._num_rounds
            steps.append(step)
        self._num_rounds += 1
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
        sequence.remembered = self.pool.remember_prefix(
            sequence.pages, sequence.tokens, sequence.num_committed, sequence.remembered
        )
        # What a law depends on is learned from the tokens that the target keeps beside its rows.
        if not sequence.request.sampling.follows_text:
            self._free_unseen_pages(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Free the slot and the pages of a sequence that is not in flight."""
        if sequence.id in self._running:
            self._leave(sequence)
        else:
            place = bisect_left(self.waiting, _place_in_line(sequence), key=_place_in_line)
            assert self.waiting.pop(place) is sequence
        del self._unfinished[sequence.id]

    def _can_admit(self, sequence: Sequence) -> bool:
        if not self._free_slots:
            return False
        if not self._running:
            return True
        # Room for the next chunk and one page for everybody who runs; less would take pages back at once.
        chunk = min(len(sequence.tokens), self.limits.prefill_chunk)
        return self.pool.num_available >= self.pool.pages_for(chunk) + len(self._running)

    def _admit(self, sequence: Sequence, lane: int) -> None:
        sequence.slot = self._free_slots.pop()
        # The last token is always computed: its hidden state gives the next one.
        max_tokens = min(len(sequence.tokens) - 1, self._prefix_kept(sequence))
        sequence.pages, sequence.remembered = self.pool.share_prefix(sequence.tokens, max_tokens)
        sequence.num_committed = len(sequence.pages) * self.pool.page_size
        if not sequence.num_output:
            sequence.stats = replace(sequence.stats, num_cached_prompt_tokens=sequence.num_committed)
        sequence.lane = lane
        self._lane_sizes[lane] += 1
        sequence.admission = self._num_admitted
        self._num_admitted += 1
        self._running[sequence.id] = sequence

    def _spread(self, num_lanes: int) -> None:
        """Move sequences that are not in flight, the newest first, to smaller lanes."""
        for sequence in reversed(self._running.values()):
            smallest = self._smallest_lane(num_lanes)
            is_uneven = self._lane_sizes[sequence.lane] > self._lane_sizes[smallest] + 1
            if not sequence.in_flight and (sequence.lane >= num_lanes or is_uneven):
                self._lane_sizes[sequence.lane] -= 1
                sequence.lane = smallest
                self._lane_sizes[smallest] += 1

    def _smallest_lane(self, num_lanes: int) -> int:
        return min(range(num_lanes), key=lambda lane: (self._lane_sizes[lane], lane))

    def _chain_lengths(self, sequences: list[Sequence]) -> dict[str, int]:
        """By request id, how many tokens each of these sequences may compute this round; none where it is absent."""
        lengths: dict[str, int] = {}
        rows_left = self.limits.max_round_tokens
        prefill_left = self.limits.prefill_chunk
        starts_left = MAX_STARTS_PER_ROUND
        lacking = [(sequence.num_uncommitted, sequence) for sequence in sequences]
        decoding = [(count, s) for count, s in lacking if count == 1]
        prompts = sorted(
            [(count, s) for count, s in lacking if count > 1], key=lambda of: _place_in_line(of[1])
        )
        for count, sequence in [*decoding, *prompts]:
            is_prompt = count > 1
            length = min(count, rows_left, prefill_left if is_prompt else 1)
            if length <= 0 or (not sequence.started and starts_left == 0):
                continue
            lengths[sequence.id] = length
            rows_left -= length
            prefill_left -= length if is_prompt else 0
            starts_left -= 0 if sequence.started else 1
        return lengths

    def _take_pages(self, sequence: Sequence, num_rows: int, evictable: list[Sequence]) -> bool:
        """Hold pages for `num_rows`, if need be those of newer ones, out of `evictable`, whose last is the newest."""
        missing = self.pool.pages_for(num_rows) - len(sequence.pages)
        while missing > self.pool.num_available:
            if evictable and evictable[-1].admission > sequence.admission:
                self._recompute_later(evictable.pop())
            else:
                # Everybody newer is in flight, or nobody is newer and the older ones need their pages.
                holds_all = len(self._running) == 1
                assert not holds_all, "a request larger than the KV cache was let in"
                return False
        if missing > 0:
            sequence.pages += self.pool.allocate(missing)
        return True

    def _recompute_later(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.stats = replace(sequence.stats, num_recomputed=sequence.stats.num_recomputed + 1)
        sequence.pending_accepted = ()
        sequence.num_committed = sequence.num_pages_sent = 0
        sequence.remembered = Prefix()
        sequence.started = False
        insort(self.waiting, sequence, key=_place_in_line)

    def _free_unseen_pages(self, sequence: Sequence) -> None:
        freed, size = sequence.num_pages_freed, self.pool.page_size
        unseen = num_unseen_pages(sequence.num_committed, self.limits.window, size)
        if unseen > freed:
            self.pool.release(sequence.pages[freed:unseen])
            sequence.num_pages_freed = unseen

    def _leave(self, sequence: Sequence) -> None:
        assert not sequence.in_flight
        self._on_leave(sequence)
        del self._running[sequence.id]
        self._lane_sizes[sequence.lane] -= 1
        self.pool.release(sequence.pages[sequence.num_pages_freed :])
        sequence.pages, sequence.num_pages_freed = [], 0
        self._free_slots.append(sequence.slot)
        if sequence.started:
            self.released_slots.append(sequence.slot)


def _place_in_line(sequence: Sequence) -> tuple[bool, float, int]:
    """Sort key of those who want to read: a text that has begun to come goes on before others begin."""
    return (
        sequence.num_output == 0,
        precedence(sequence.num_uncommitted, sequence.waiting_since),
        sequence.arrival,
    )
