"""Lanes, prompt chunks and pages of sequences without any model. Rounds are played by `settle` below."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.workers.rounds.messages import MAX_STARTS_PER_ROUND
from outrider.workers.rounds.pages import PagePool
from outrider.workers.rounds.scheduler import PlannedStep, Scheduler, SchedulerLimits
from outrider.workers.rounds.sequence import DraftOptions, Request, Sequence
from outrider.workers.sampling.params import SamplingParams

PAGE = 4


def scheduler_with(
    num_pages: int = 100,
    max_sequences: int = 8,
    max_round_tokens: int = 32,
    prefill_chunk: int = 8,
    prefix_sharing: bool = False,
) -> Scheduler:
    limits = SchedulerLimits(max_sequences, max_round_tokens, prefill_chunk)
    return Scheduler(limits, PagePool(num_pages, PAGE, prefix_sharing))


def request(request_id: str, prompt_length: int, max_tokens: int = 100, first_token: int = 1) -> Request:
    prompt = tuple(range(first_token, first_token + prompt_length))
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens), DraftOptions((), 4, 4))


def submit(scheduler: Scheduler, *lengths: int, first_token: int = 1) -> list[Sequence]:
    """One request of each prompt length, named a, b, c, ..."""
    for name, length in zip("abcdefghijkl", lengths, strict=False):
        scheduler.submit(request(name, length, first_token=first_token))
    return list(scheduler.waiting)[-len(lengths) :]


def send(scheduler: Scheduler, steps: list[PlannedStep]) -> None:
    """What the loop does with planned steps."""
    for step in steps:
        step.sequence.started = True
        step.sequence.in_flight = True
        step.sequence.num_pages_sent = len(step.sequence.pages)
        step.sequence.pending_accepted = ()
        scheduler.commit_sent(step.sequence)


def settle(steps: list[PlannedStep], num_emitted: int = 1) -> None:
    """The scores of planned steps: chunks are committed; sequences at their end emit tokens."""
    for step in steps:
        sequence = step.sequence
        sequence.in_flight = False
        if step.reaches_end:
            sequence.num_committed += step.chain_length + num_emitted - 1
            sequence.tokens += [7] * num_emitted
        else:
            sequence.num_committed += step.chain_length


def play(scheduler: Scheduler, lane: int = 0, num_lanes: int = 1) -> dict[str, int]:
    """A whole round of one lane; chain lengths by request id."""
    scheduler.assign_lanes(num_lanes)
    steps = scheduler.plan(lane)
    send(scheduler, steps)
    settle(steps)
    return {step.sequence.id: step.chain_length for step in steps}


def test_a_long_prompt_is_read_in_chunks() -> None:
    scheduler = scheduler_with(prefill_chunk=8)
    (sequence,) = submit(scheduler, 19)
    assert [play(scheduler)["a"] for _ in range(4)] == [8, 8, 3, 1]
    assert sequence.num_output == 2  # the last chunk reaches the end, so it samples


def test_a_long_prompt_does_not_stall_those_who_decode() -> None:
    scheduler = scheduler_with(prefill_chunk=8)
    submit(scheduler, 3)
    play(scheduler)
    scheduler.submit(request("long", 30))
    for chunk in (8, 8, 8, 6):
        assert play(scheduler) == {"a": 1, "long": chunk}


def test_prompts_share_the_chunk_of_a_round_oldest_first() -> None:
    scheduler = scheduler_with(prefill_chunk=8)
    submit(scheduler, 5, 5, 5)
    assert play(scheduler) == {"a": 5, "b": 3}
    assert play(scheduler) == {"a": 1, "b": 2, "c": 5}


def test_a_round_has_no_more_rows_than_allowed() -> None:
    scheduler = scheduler_with(max_round_tokens=10, prefill_chunk=8)
    submit(scheduler, 3, 3, 2, 9)
    assert play(scheduler) == {"a": 3, "b": 3, "c": 2}
    assert play(scheduler) == {"a": 1, "b": 1, "c": 1, "d": 7}
    assert play(scheduler) == {"a": 1, "b": 1, "c": 1, "d": 2}


def test_requests_wait_for_a_free_slot_in_the_order_they_came() -> None:
    scheduler = scheduler_with(max_sequences=2)
    a, b, c, d = submit(scheduler, 2, 2, 2, 2)
    assert scheduler.assign_lanes(1) == [a, b]
    assert scheduler.assign_lanes(1) == []
    scheduler.finish(a)
    assert scheduler.assign_lanes(1) == [c]
    assert c.slot == a.slot
    assert list(scheduler.waiting) == [d]


def test_only_so_many_sequences_start_in_one_round() -> None:
    scheduler = scheduler_with()
    submit(scheduler, 1, 1, 1, 1, 1, 1)
    assert len(scheduler.assign_lanes(1)) == MAX_STARTS_PER_ROUND
    assert len(scheduler.assign_lanes(1)) == 2
    assert list(play(scheduler)) == ["a", "b", "c", "d"]
    assert list(play(scheduler)) == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize(("num_pages", "admitted"), [(5, True), (4, False)])
def test_a_sequence_is_admitted_when_its_chunk_and_a_page_for_everybody_else_are_free(
    num_pages: int, admitted: bool
) -> None:
    scheduler = scheduler_with(num_pages=num_pages, prefill_chunk=8)
    submit(scheduler, 8)
    play(scheduler)  # holds two pages; the newcomer needs two, and one is left for growth
    (newcomer,) = submit(scheduler, 8)
    assert (newcomer in scheduler.assign_lanes(1)) == admitted


def test_shared_prefixes_are_taken_and_counted() -> None:
    scheduler = scheduler_with(prefix_sharing=True, prefill_chunk=16)
    a, b = submit(scheduler, 10, 9)
    scheduler.waiting.remove(b)
    assert play(scheduler) == {"a": 10}
    assert play(scheduler) == {"a": 1}  # this message commits the rows of the prompt
    scheduler.waiting.append(b)
    assert play(scheduler) == {"a": 1, "b": 1}  # two full pages of 9 tokens, and the last one
    assert b.pages[:2] == a.pages[:2]
    assert b.stats.num_cached_prompt_tokens == 8


def test_rows_are_shared_only_once_their_commit_is_under_way() -> None:
    scheduler = scheduler_with(prefix_sharing=True, prefill_chunk=16)
    _, b = submit(scheduler, 10, 10)
    assert play(scheduler) == {"a": 10, "b": 6}  # nothing to share yet: both read the prompt
    assert b.stats.num_cached_prompt_tokens == 0


def test_the_newest_sequence_is_computed_again_when_pages_run_out() -> None:
    scheduler = scheduler_with(num_pages=4)
    a, b, c = submit(scheduler, 4, 4, 3)
    assert play(scheduler) == {"a": 4, "b": 4}  # no page would be left for c
    assert play(scheduler) == {"a": 1, "b": 1}
    for _ in range(3):
        play(scheduler)
    assert (a.num_committed, b.num_committed) == (8, 8)
    assert scheduler.pool.num_available == 0
    slot = b.slot
    assert play(scheduler) == {"a": 1}
    assert (b.pages, b.num_committed, b.num_pages_sent, b.started) == ([], 0, 0, False)
    assert b.stats.num_recomputed == 1
    assert scheduler.released_slots == [slot]
    assert list(scheduler.waiting) == [b, c]  # it goes first when there is room again

    scheduler.finish(a)
    assert play(scheduler) == {"b": 8}  # all it knows is computed again, output included
    assert play(scheduler) == {"b": 1, "c": 3}
    assert b.stats.num_recomputed == 1


def test_the_accepted_rows_of_a_recomputed_sequence_are_not_kept() -> None:
    scheduler = scheduler_with(num_pages=4)
    a, b = submit(scheduler, 4, 4)
    play(scheduler)
    for _ in range(4):
        play(scheduler)
    b.pending_accepted = (0, 1)
    play(scheduler)
    assert b not in scheduler.running
    assert b.pending_accepted == ()
    assert a in scheduler.running


def test_pages_are_never_taken_from_a_sequence_in_flight() -> None:
    scheduler = scheduler_with(num_pages=4)
    a, b = submit(scheduler, 4, 4)
    scheduler.assign_lanes(2)
    assert (a.lane, b.lane) == (0, 1)
    for _ in range(5):
        for lane in (0, 1):
            steps = scheduler.plan(lane)
            send(scheduler, steps)
            settle(steps)
    b_steps = [PlannedStep(b, 1)]
    send(scheduler, b_steps)
    assert scheduler.plan(0) == []  # a needs a page; b has it, and is with the target
    assert b in scheduler.running
    settle(b_steps)
    assert [step.sequence for step in scheduler.plan(0)] == [a]
    assert b not in scheduler.running


def test_a_sequence_that_lost_its_pages_in_this_round_is_not_planned_in_it() -> None:
    scheduler = scheduler_with(num_pages=4)
    a, b = submit(scheduler, 4, 4)
    for _ in range(5):
        play(scheduler)
    steps = scheduler.plan(0)
    assert [step.sequence for step in steps] == [a]
    assert b not in scheduler.running


def test_the_newest_sequence_waits_rather_than_take_pages_from_older_ones() -> None:
    scheduler = scheduler_with(num_pages=3)
    a, b = submit(scheduler, 3, 3)
    play(scheduler)
    a.tokens += [7] * 4  # a has three pages' worth of tokens to compute
    b.tokens += [7] * 4
    assert scheduler.pool.num_available == 1
    steps = scheduler.plan(0)
    assert [step.sequence for step in steps] == [a]
    assert b in scheduler.running
    assert b.stats.num_recomputed == 0


def test_draft_nodes_get_only_pages_that_nobody_needs() -> None:
    scheduler = scheduler_with(num_pages=4)
    a, b = submit(scheduler, 4, 4)
    play(scheduler)
    steps = scheduler.plan(0)
    # Each has 4 committed rows and a chain of one in its second page: no page is left but their own.
    assert [scheduler.tree_room(step) for step in steps] == [3, 3]
    scheduler.take_tree_pages(steps[0], 3)
    assert (len(a.pages), len(b.pages)) == (2, 2)


def test_draft_nodes_take_free_pages() -> None:
    scheduler = scheduler_with(num_pages=4)
    (a,) = submit(scheduler, 4)
    play(scheduler)
    (step,) = scheduler.plan(0)
    assert scheduler.tree_room(step) == 11
    scheduler.take_tree_pages(step, 4)
    assert len(a.pages) == 3
    assert scheduler.tree_room(step) == 11
    scheduler.take_tree_pages(step, 11)
    assert scheduler.pool.num_available == 0


def test_lanes_are_filled_evenly() -> None:
    scheduler = scheduler_with()
    sequences = submit(scheduler, 1, 1, 1, 1)
    scheduler.assign_lanes(2)
    assert [s.lane for s in sequences] == [0, 1, 0, 1]


def test_lanes_are_balanced_when_sequences_leave() -> None:
    scheduler = scheduler_with()
    a, b, c, d = submit(scheduler, 1, 1, 1, 1)
    scheduler.assign_lanes(2)
    scheduler.finish(b)
    scheduler.finish(d)
    scheduler.assign_lanes(2)
    assert sorted([a.lane, c.lane]) == [0, 1]


def test_a_sequence_in_flight_stays_in_its_lane() -> None:
    scheduler = scheduler_with()
    a, b, c, d = submit(scheduler, 1, 1, 1, 1)
    scheduler.assign_lanes(2)
    lane_0 = scheduler.plan(0)
    send(scheduler, lane_0)
    scheduler.finish(b)
    scheduler.finish(d)
    scheduler.assign_lanes(2)
    assert (a.lane, c.lane) == (0, 0)
    settle(lane_0)
    scheduler.assign_lanes(2)
    assert sorted([a.lane, c.lane]) == [0, 1]


def test_two_lanes_become_one_as_their_rounds_come_back() -> None:
    scheduler = scheduler_with()
    a, b, c = submit(scheduler, 1, 1, 1)
    scheduler.assign_lanes(2)
    lane_1 = scheduler.plan(1)
    send(scheduler, lane_1)
    scheduler.assign_lanes(1)
    assert [s.lane for s in (a, b, c)] == [0, 1, 0]
    settle(lane_1)
    scheduler.assign_lanes(1)
    assert [s.lane for s in (a, b, c)] == [0, 0, 0]


def test_finishing_frees_slot_and_pages_and_tells_the_target_once() -> None:
    scheduler = scheduler_with(num_pages=4)
    (a,) = submit(scheduler, 8)
    play(scheduler)
    scheduler.finish(a)
    assert scheduler.is_idle
    assert scheduler.pool.num_available == 4
    assert scheduler.released_slots == [a.slot]


def test_the_target_hears_nothing_of_a_sequence_it_never_knew() -> None:
    scheduler = scheduler_with()
    a, b = submit(scheduler, 8, 8)
    scheduler.finish(a)  # still waiting
    scheduler.assign_lanes(1)
    scheduler.finish(b)  # admitted, but no message told of it
    assert scheduler.released_slots == []
    assert scheduler.is_idle


def test_requests_are_found_by_id_wherever_they_are() -> None:
    scheduler = scheduler_with(max_sequences=1)
    a, b = submit(scheduler, 1, 1)
    scheduler.assign_lanes(1)
    assert scheduler.find("a") is a
    assert scheduler.find("b") is b
    assert scheduler.find("c") is None


def test_a_request_larger_than_the_whole_cache_is_our_own_mistake() -> None:
    scheduler = scheduler_with(num_pages=1)
    submit(scheduler, 5)
    scheduler.assign_lanes(1)
    with pytest.raises(AssertionError, match="larger than the KV cache"):
        scheduler.plan(0)


@settings(max_examples=60, stateful_step_count=60, deadline=None)
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
