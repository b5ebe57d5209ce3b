"""What the token loop sends, in what order, and what becomes of requests. Scripted workers, virtual time."""

import queue
import threading
from itertools import pairwise

import pytest

from outrider.workers.link.messages import Draft, Scores, SequenceStep
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.scheduler import SchedulerLimits
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.sequence import RequestStats, TokenEvent
from support.local_engine import default_options
from support.scripted import ScriptedTarget, right_token, scripted_loop
from support.steps import scores_of, steps_in
from support.virtual_time import run_requests, scripted_request

SERIAL = default_options(overlapped=False, fixed_budget=True)
OVERLAPPED = default_options(fixed_budget=True)
LOOPS = pytest.mark.parametrize("options", [SERIAL, OVERLAPPED], ids=["serial", "overlapped"])


def right_text(first_position: int, num_tokens: int) -> list[int]:
    return [right_token(position) for position in range(first_position, first_position + num_tokens)]


def steps_of(drafts: list[Draft], slot: int) -> list[SequenceStep]:
    return [step for draft in drafts for step in steps_in(draft.steps) if step.slot == slot]


@LOOPS
def test_requests_run_to_their_length(options: LoopOptions) -> None:
    lengths = {"a": 1, "b": 7, "c": 20}
    run = run_requests([scripted_request(name, n) for name, n in lengths.items()], options=options)
    assert run.texts == {name: right_text(3, n) for name, n in lengths.items()}
    assert all(events[-1].finish_reason == "length" for events in run.events.values())
    assert all(event.finish_reason == "" for events in run.events.values() for event in events[:-1])
    assert run.num_available_pages == 256


@LOOPS
def test_a_round_is_one_message_with_what_was_accepted_and_what_is_next(options: LoopOptions) -> None:
    run = run_requests([scripted_request("a", 12)], options=options)
    first, second, *_ = steps_of(run.drafts, slot=0)
    # The prompt 1 2 3 with a chain of four drafts; all right, so the target adds a fifth.
    text = right_text(3, 12)
    assert first.tokens == (1, 2, 3, *text[:4])
    assert first.parents == (0, 0, 1, 2, 3, 4, 5)
    assert first.first_sampled == 2
    assert second.accepted == (0, 1, 2, 3, 4, 5, 6)
    assert second.tokens[0] == text[4]
    assert second.first_sampled == 0
    assert run.drafts[0].starts[0].prompt_length == 3
    assert [draft.round_id for draft in run.drafts] == list(range(1, len(run.drafts) + 1))
    assert all(len(draft.steps) for draft in run.drafts)


@LOOPS
def test_plain_decoding_is_a_root_only_tree(options: LoopOptions) -> None:
    run = run_requests([scripted_request("a", 9, max_nodes=0)], options=options)
    assert len(run.drafts) == 9
    assert all(len(step.tokens) == 1 for step in steps_of(run.drafts, 0)[1:])
    stats = run.events["a"][-1].stats
    assert stats == RequestStats(num_rounds=9)


def test_limits_of_a_request_hold_for_its_trees() -> None:
    requests = [
        scripted_request("few", 40, max_nodes=2, max_depth=8),
        scripted_request("shallow", 40, max_nodes=8, max_depth=3),
        scripted_request("plain", 10, max_nodes=0),
    ]
    run = run_requests(requests, options=OVERLAPPED)
    for slot, limit in ((0, 2), (1, 3), (2, 0)):
        assert max(len(step.tokens) - 1 for step in steps_of(run.drafts, slot)[1:]) == limit


def test_nothing_is_drafted_beyond_the_length() -> None:
    run = run_requests([scripted_request("a", 7)], options=OVERLAPPED)
    stats = run.events["a"][-1].stats
    assert stats.num_drafted == stats.num_accepted == 5  # 4 + 1 accepted, and two tokens of the target
    assert stats.num_rounds == 2


@LOOPS
def test_a_long_prompt_does_not_stall_those_who_decode(options: LoopOptions) -> None:
    limits = SchedulerLimits(max_sequences=8, max_round_tokens=64, prefill_chunk=16)
    requests = [
        scripted_request("short", 30, max_nodes=0),
        scripted_request("long", 4, prompt_length=150, max_nodes=0),
    ]
    run = run_requests(requests, options=options, limits=limits)
    chunks = [len(step.tokens) for step in steps_of(run.drafts, 1)]
    assert chunks == [16] * 9 + [6, 1, 1, 1]
    # While the prompt is read the other one gets a token in every second round at least (it has its own lane).
    decoding = [any(step.slot == 0 for step in steps_in(draft.steps)) for draft in run.drafts[:24]]
    assert all(a or b for a, b in pairwise(decoding))
    assert run.texts["long"] == right_text(150, 4)


def test_no_message_has_more_rows_than_allowed() -> None:
    limits = SchedulerLimits(max_sequences=8, max_round_tokens=12, prefill_chunk=8)
    requests = [scripted_request(str(i), 20, prompt_length=3 + i) for i in range(6)]
    options = default_options(fixed_budget=True, max_round_tokens=12)
    run = run_requests(requests, options=options, limits=limits)
    assert max(draft.steps.num_rows for draft in run.drafts) == 12
    assert run.texts == {str(i): right_text(3 + i, 20) for i in range(6)}


@LOOPS
@pytest.mark.parametrize("num_pages", [4, 5, 7])
def test_scarce_pages_change_no_text(options: LoopOptions, num_pages: int) -> None:
    # Each request alone needs four pages of 16 rows in the end.
    requests = [scripted_request(str(i), 40, prompt_length=20) for i in range(4)]
    run = run_requests(requests, options=options, num_pages=num_pages)
    assert run.texts == {str(i): right_text(20, 40) for i in range(4)}
    assert run.num_available_pages == num_pages
    assert sum(events[-1].stats.num_recomputed for events in run.events.values()) > 0


@LOOPS
def test_a_cancelled_request_frees_its_pages_within_a_round(options: LoopOptions) -> None:
    free_at_the_end: list[int] = []

    def cancel_after_three_events(loop: RoundLoop, event: TokenEvent) -> None:
        if event.request_id == "a" and event.stats.num_rounds == 3:
            loop.cancel("a")
        if event.finish_reason == "cancelled":
            free_at_the_end.append(loop.scheduler.pool.num_available)

    requests = [scripted_request("a", 1000, max_nodes=0), scripted_request("b", 20, max_nodes=0)]
    run = run_requests(requests, options=options, on_event=cancel_after_three_events)
    events = run.events["a"]
    assert [event.finish_reason for event in events][-2:] == ["", "cancelled"]
    assert events[-1].tokens == ()
    assert 3 <= sum(len(event.tokens) for event in events) <= 4  # one round may have been under way
    assert free_at_the_end == [255]  # only b's page is out
    assert run.texts["b"] == right_text(3, 20)
    assert [0] in [list(draft.released_slots) for draft in run.drafts]


@LOOPS
def test_a_waiting_request_is_cancelled_without_having_run(options: LoopOptions) -> None:
    def cancel_at_once(loop: RoundLoop, event: TokenEvent) -> None:
        if event.request_id == "a":
            loop.cancel("b")
            loop.cancel("nobody")

    limits = SchedulerLimits(max_sequences=1, max_round_tokens=64, prefill_chunk=16)
    requests = [scripted_request("a", 20), scripted_request("b", 20)]
    run = run_requests(requests, options=options, limits=limits, on_event=cancel_at_once)
    (event,) = run.events["b"]
    assert (event.tokens, event.finish_reason) == ((), "cancelled")
    assert run.texts["a"] == right_text(3, 20)


@LOOPS
def test_requests_join_and_leave_at_any_round(options: LoopOptions) -> None:
    limits = SchedulerLimits(max_sequences=3, max_round_tokens=64, prefill_chunk=16)
    requests = [scripted_request(str(i), 3 + 7 * (i % 4)) for i in range(12)]
    run = run_requests(requests, options=options, limits=limits)
    assert run.texts == {str(i): right_text(3, 3 + 7 * (i % 4)) for i in range(12)}
    slots = [slot for draft in run.drafts for slot in draft.steps.slots.tolist()]
    assert set(slots) == {0, 1, 2}
    assert sum(len(draft.starts) for draft in run.drafts) == 12


def test_two_lanes_alternate_and_one_lane_holds_all() -> None:
    requests = [scripted_request(str(i), 30) for i in range(4)]
    apart = run_requests(requests, options=OVERLAPPED)
    assert all(len(draft.steps) == 2 for draft in apart.drafts[2:6])
    shared = default_options(fixed_budget=True, merge_lanes=True, draft_costs=True)
    together = run_requests(requests, options=shared)
    assert all(len(draft.steps) == 4 for draft in together.drafts[2:6])
    assert apart.texts == together.texts


def test_lanes_merge_where_the_measured_times_say_so() -> None:
    requests = [scripted_request(str(i), 30) for i in range(4)]
    options = default_options(fixed_budget=True, merge_lanes=True)
    # A pass of 40 ms for any number of rows, drafting takes 4 ms: two lanes would take nearly twice as long.
    flat = run_requests(requests, options=options, step_s=0.001)
    assert all(len(draft.steps) == 4 for draft in flat.drafts[2:6])
    # 10 ms a row: half the sequences take half the time, and two lanes hide the drafting.
    by_rows = PassProfile((1, 100), (0.01, 1.0))
    steep = run_requests(requests, options=options, step_s=0.001, latencies=by_rows)
    assert all(len(draft.steps) == 2 for draft in steep.drafts[2:6])


def test_the_budget_falls_to_the_root_alone_where_speculation_loses() -> None:
    # Every row costs as much as the first, and no draft is right.
    run = run_requests(
        [scripted_request("a", 60)],
        options=default_options(overlapped=False),
        is_right=lambda position: False,
        latencies=PassProfile((1, 100), (0.04, 4.0)),
    )
    assert all(len(step.tokens) == 1 for step in steps_of(run.drafts, 0)[-20:])
    plain = 3 * 0.04 + 59 * 0.04  # the prompt of three tokens, then a row for each
    assert run.seconds < plain * 1.1  # what it took to find out


def test_prompts_are_read_for_drafting_only_where_drafting_may_pay() -> None:
    # Every row costs as much as the first: nothing is ever gained by drafting.
    requests = [scripted_request(str(i), 10) for i in range(3)] + [scripted_request("long", 200)]
    options = default_options(overlapped=False, num_lanes=1, draft_costs=True)
    by_rows = PassProfile((1, 100), (0.04, 4.0))
    assert not run_requests(requests, options=options, latencies=by_rows).prompts_read
    # Rows are free up to four: no gain while as many sequences run, but for the one that is left over.
    few_are_free = PassProfile((1, 4, 5, 100), (0.040, 0.042, 0.2, 4.0))
    assert run_requests(requests, options=options, latencies=few_are_free).prompts_read == {"long"}


def test_a_prompt_is_read_for_drafting_only_if_the_answer_is_long_enough() -> None:
    options = default_options(overlapped=False, draft_costs=True)
    short = run_requests([scripted_request("short", 1, prompt_length=40)], options=options)
    assert not short.prompts_read
    long = run_requests([scripted_request("long", 100, prompt_length=40)], options=options)
    assert long.prompts_read == {"long"}


def test_a_drafter_that_seemed_too_slow_is_tried_again() -> None:
    # A step is taken for 30 ms, and the first proposals for right every other time: 20 ms of the target's time.
    run = run_requests(
        [scripted_request("a", 400, prompt_length=40)],
        options=default_options(overlapped=False, draft_costs=True),
        assumed_step_s=0.03,
        must_read=True,
    )
    assert run.prompts_read == {"a"}
    assert all(len(step.tokens) > 1 for step in steps_of(run.drafts, 0)[-20:-2])


def test_the_budget_takes_what_pays() -> None:
    run = run_requests(
        [scripted_request("a", 60)],
        options=default_options(overlapped=False),
        latencies=PassProfile((1, 8), (0.040, 0.041)),
    )
    assert all(len(step.tokens) == 5 for step in steps_of(run.drafts, 0)[5:-2])


class CountingLink:
    """A target that answers at once, and lets a test wait for what it was sent."""

    def __init__(self) -> None:
        self.sent: queue.Queue[Draft] = queue.Queue()
        self._scores: queue.Queue[Scores] = queue.Queue()
        self._target = ScriptedTarget(0.0)

    def send(self, draft: Draft) -> None:
        self.sent.put(draft)
        if not draft.stop:
            self._scores.put(self._target.step(draft))

    def receive(self) -> Scores:
        return self._scores.get(timeout=20)

    def poll(self) -> bool:
        return not self._scores.empty()

    def next_sent(self) -> Draft:
        return self.sent.get(timeout=20)


def loop_over(link: CountingLink, options: LoopOptions) -> RoundLoop:
    cost = CostModel(PassProfile((1,), (0.01,)))
    limits = SchedulerLimits(4, 64, 16)
    return scripted_loop(link, options, limits, PagePool(16, 16, False), cost, lambda event: None)


def loop_in_a_thread(link: CountingLink, options: LoopOptions) -> tuple[RoundLoop, threading.Thread]:
    loop = loop_over(link, options)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    return loop, thread


@pytest.mark.parametrize("overlapped", [False, True])
def test_an_idle_loop_sends_empty_rounds_and_what_the_target_has_to_know(overlapped: bool) -> None:
    link = CountingLink()
    loop, thread = loop_in_a_thread(link, default_options(overlapped=overlapped, heartbeat_s=0.01))
    assert len(link.next_sent().steps) == 0
    assert len(link.next_sent().steps) == 0
    loop.submit(scripted_request("a", 1, max_nodes=0))
    sent = link.next_sent()
    while not len(sent.steps):
        sent = link.next_sent()
    assert link.next_sent().released_slots == (0,)  # the heartbeat after the last round
    loop.stop()
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.parametrize("overlapped", [False, True])
def test_stopping_ends_the_loop_and_tells_the_target(overlapped: bool) -> None:
    link = CountingLink()
    loop, thread = loop_in_a_thread(link, default_options(overlapped=overlapped, heartbeat_s=20.0))
    loop.submit(scripted_request("endless", 10**6, max_nodes=0))
    assert len(link.next_sent().steps)
    loop.stop()
    thread.join(timeout=20)
    assert not thread.is_alive()
    *rounds, last = link.sent.queue
    assert last.stop
    assert not any(draft.stop for draft in rounds)


def test_scores_of_another_round_are_our_own_mistake() -> None:
    class Confused(CountingLink):
        def receive(self) -> Scores:
            return scores_of(99)

    loop = loop_over(Confused(), SERIAL)
    loop.submit(scripted_request("a", 5))
    with pytest.raises(AssertionError, match="99"):
        loop.run()
