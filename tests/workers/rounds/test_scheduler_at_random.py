"""Whatever happens in whatever order: pages and slots add up, nothing in flight moves, everybody gets done."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.workers.rounds.scheduler import PlannedStep
from outrider.workers.sequences.sequence import Sequence
from support.scheduling import PAGE, request, scheduler_with, send, settle


@settings(max_examples=60, stateful_step_count=60)
class ScheduledAtRandom(RuleBasedStateMachine):
    """Requests come, are cancelled, run in one or two lanes with far too few pages, and all end."""

    NUM_PAGES, SLOTS = 9, 4

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler_with(self.NUM_PAGES, self.SLOTS, 12, 6, prefix_sharing=True)
        self.in_flight: dict[int, list[PlannedStep]] = {}
        self.frozen: dict[str, tuple[int, int, list[int]]] = {}  # lane, slot and pages of those in flight
        self.known_slots: set[int] = set()  # by the target
        self.count = 0

    @rule(length=st.integers(1, 12), max_tokens=st.integers(1, 20), first_token=st.integers(1, 2))
    def come(self, length: int, max_tokens: int, first_token: int) -> None:
        self.count += 1
        self.scheduler.submit(request(str(self.count), length, max_tokens, first_token))

    @rule(num_lanes=st.sampled_from([1, 2, 2]))
    def assign(self, num_lanes: int) -> None:
        self.scheduler.assign_lanes(num_lanes)

    @rule(lane=st.integers(0, 1), num_nodes=st.integers(0, 5))
    def plan_and_send(self, lane: int, num_nodes: int) -> None:
        if lane in self.in_flight:
            return
        steps = self.scheduler.plan(lane)
        assert sum(step.chain_length for step in steps) <= 12
        for step in steps:
            if step.reaches_end:
                self.scheduler.take_tree_pages(step, min(num_nodes, self.scheduler.tree_room(step)))
            rows = len(step.sequence.pages) * PAGE
            assert rows >= step.sequence.num_committed + step.chain_length
        if not steps:
            return
        self.known_slots -= set(self.scheduler.released_slots)
        self.scheduler.released_slots = []
        for step in steps:
            assert step.sequence.started == (step.sequence.slot in self.known_slots)
            self.known_slots.add(step.sequence.slot)
        send(self.scheduler, steps)
        self.in_flight[lane] = steps
        self.frozen |= {s.sequence.id: self.state_of(s.sequence) for s in steps}

    @precondition(lambda self: self.in_flight)
    @rule(first=st.booleans(), num_emitted=st.integers(1, 4))
    def receive(self, first: bool, num_emitted: int) -> None:
        lane = min(self.in_flight) if first else max(self.in_flight)
        steps = self.in_flight.pop(lane)
        for step in steps:
            sequence = step.sequence
            del self.frozen[sequence.id]
            rows = len(sequence.pages) * PAGE - sequence.num_committed - step.chain_length
            settle([step], min(num_emitted, rows + 1))
            if sequence.num_remaining <= 0 or sequence.cancelled:
                self.scheduler.finish(sequence)

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        everybody = [*self.scheduler.running, *self.scheduler.waiting]
        if everybody:
            sequence = everybody[which % len(everybody)]
            sequence.cancelled = True
            if not sequence.in_flight:
                self.scheduler.finish(sequence)

    def state_of(self, sequence: Sequence) -> tuple[int, int, list[int]]:
        return sequence.lane, sequence.slot, list(sequence.pages)

    def teardown(self) -> None:
        """Whatever happened before: everybody gets to the end."""
        for _ in range(2000):
            if self.scheduler.is_idle:
                break
            self.assign(2)
            for lane in (0, 1):
                self.plan_and_send(lane, 3)
            assert self.in_flight, "nobody can go on"
            self.receive(True, 3)
        assert self.scheduler.is_idle
        assert self.scheduler.pool.num_available == self.NUM_PAGES

    @invariant()
    def nothing_in_flight_is_moved_or_released(self) -> None:
        running = {sequence.id: sequence for sequence in self.scheduler.running}
        for request_id, state in self.frozen.items():
            assert self.state_of(running[request_id]) == state

    @invariant()
    def slots_and_pages_belong_to_those_who_run(self) -> None:
        scheduler = self.scheduler
        slots = [sequence.slot for sequence in scheduler.running]
        assert sorted(slots + scheduler._free_slots) == list(range(self.SLOTS))
        held = Counter(page for sequence in scheduler.running for page in sequence.pages)
        assert scheduler.pool._holders == [held[page] for page in range(self.NUM_PAGES)]
        assert all(not sequence.pages for sequence in scheduler.waiting)

    @invariant()
    def the_target_knows_the_slots_of_those_who_started(self) -> None:
        started = {s.slot for s in self.scheduler.running if s.started}
        assert self.known_slots - set(self.scheduler.released_slots) == started


TestScheduledAtRandom = ScheduledAtRandom.TestCase
