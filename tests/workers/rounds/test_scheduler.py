"""Lanes, prompt chunks and pages of sequences without any model. Pages of four rows."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from outrider.workers.link.messages import MAX_STARTS_PER_ROUND
from outrider.workers.rounds.scheduler import PlannedStep, Scheduler, precedence
from outrider.workers.sequences.sequence import Sequence
from support.scheduling import request, scheduler_with, send, settle


def submit(scheduler: Scheduler, *lengths: int, first_token: int = 1) -> list[Sequence]:
    """One request of each prompt length, named a, b, c, ..."""
    for name, length in zip("abcdefghijkl", lengths, strict=False):
        scheduler.submit(request(name, length, first_token=first_token))
    return sorted(scheduler.waiting, key=lambda sequence: sequence.arrival)[-len(lengths) :]


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


def first_tokens(scheduler: Scheduler, prompts: Iterable[dict[str, int]]) -> dict[str, int]:
    """In which round each request's first token came; it is its only one. `prompts` come before each round."""
    rounds: dict[str, int] = {}
    for number, new in enumerate(prompts):
        for name, length in new.items():
            scheduler.submit(request(name, length))
        play(scheduler)
        for sequence in [s for s in scheduler.running if s.num_output]:
            rounds[sequence.id] = number
            scheduler.finish(sequence)
    return rounds


def test_first_tokens_of_mixed_prompts_do_not_depend_on_their_order() -> None:
    lengths = {"a": 40, "b": 9, "c": 300, "d": 22, "e": 120, "f": 64, "g": 13, "h": 800}
    orders = [sorted(lengths), sorted(lengths)[::-1], list("hbcafedg"), list("bcadefgh")]
    for max_sequences in (8, 3):
        seen = []
        for names in orders:
            scheduler = scheduler_with(400, max_sequences, max_round_tokens=40, prefill_chunk=32)
            at_once = {name: lengths[name] for name in names}
            seen.append(first_tokens(scheduler, [at_once] + [{}] * 60))
        assert all(rounds == seen[0] for rounds in seen)
        assert sorted(seen[0], key=lambda name: seen[0][name]) == sorted(lengths, key=lambda n: lengths[n])
        assert sorted(seen[0].values())[len(lengths) // 2] <= 5  # of 1368 tokens in 43 rounds
        assert max(seen[0].values()) <= 48


@pytest.mark.parametrize("max_sequences", [8, 1])
def test_a_long_prompt_gets_done_under_an_endless_stream_of_short_ones(max_sequences: int) -> None:
    # Each short one takes a whole round's chunk, so without ageing the long one would never be read.
    scheduler = scheduler_with(200, max_sequences, prefill_chunk=8)
    stream = ({f"short {n}": 8} | ({"long": 64} if n == 0 else {}) for n in range(120))
    rounds = first_tokens(scheduler, stream)
    # Its eight chunks wait 4 log2(left / 8) rounds each, 61 in all, and as long as the short ones that wait then.
    assert rounds["long"] <= 61 + sum(range(9)) + 8
    assert rounds["short 0"] == 0  # and it does not hold up those who come
    waits = [rounds[f"short {n}"] - n for n in range(100)]
    assert max(waits) <= 9


def test_a_prompt_that_waited_goes_before_shorter_ones_that_come_later() -> None:
    assert precedence(64, 0) < precedence(8, 13)
    assert precedence(8, 11) < precedence(64, 0)  # 4 log2(64 / 8) = 12 rounds later
    assert precedence(8, 5) < precedence(9, 5)


def test_no_more_of_a_prefix_is_shared_than_everybody_has_kept() -> None:
    kept = {"b": 7, "c": 0, "d": 100}
    scheduler = scheduler_with(prefix_sharing=True, prefix_kept=lambda s: kept.get(s.id, 0))
    submit(scheduler, 10)
    for _ in range(3):
        play(scheduler)
    for name in kept:
        scheduler.submit(request(name, 10))
    scheduler.assign_lanes(1)
    cached = {s.id: s.stats.num_cached_prompt_tokens for s in scheduler.running}
    assert cached == {"a": 0, "b": 4, "c": 0, "d": 8}  # in whole pages


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
    scheduler.submit(request("newcomer", 8))
    assert (scheduler.find("newcomer") in scheduler.assign_lanes(1)) == admitted


def test_shared_prefixes_are_taken_and_counted() -> None:
    scheduler = scheduler_with(prefix_sharing=True, prefill_chunk=16)
    (a,) = submit(scheduler, 10)
    assert play(scheduler) == {"a": 10}
    assert play(scheduler) == {"a": 1}  # this message commits the rows of the prompt
    scheduler.submit(request("b", 9))
    (b,) = scheduler.waiting
    assert play(scheduler) == {"a": 1, "b": 1}  # two full pages of 9 tokens, and the last one
    assert b.pages[:2] == a.pages[:2]
    assert b.stats.num_cached_prompt_tokens == 8


def test_rows_are_shared_only_once_their_commit_is_under_way() -> None:
    scheduler = scheduler_with(prefix_sharing=True, prefill_chunk=16)
    _, b = submit(scheduler, 10, 10)
    assert play(scheduler) == {"a": 10, "b": 6}  # nothing to share yet: both read the prompt
    assert b.stats.num_cached_prompt_tokens == 0


def test_pages_behind_the_window_serve_others_but_not_where_penalties_count_their_tokens() -> None:
    for repetition_penalty, num_held in ((1.0, 2), (1.1, 8)):
        scheduler = scheduler_with(window=5)
        asked = request("a", 24)
        sampling = replace(asked.sampling, repetition_penalty=repetition_penalty)
        scheduler.submit(replace(asked, sampling=sampling))
        for _ in range(11):
            play(scheduler)
        (a,) = scheduler.running
        # The last message committed 31 rows: its query, the 32nd row, sees those from the 28th on.
        assert (a.num_committed, len(a.pages)) == (32, 8)
        assert 100 - scheduler.pool.num_available == num_held
        scheduler.finish(a)
        assert scheduler.pool.num_available == 100


def test_the_newest_sequence_is_computed_again_when_pages_run_out() -> None:
    scheduler = scheduler_with(num_pages=4)
    a, b, _ = submit(scheduler, 4, 4, 4)
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
    scheduler.submit(request("d", 1))
    # Its text has begun to come, so it goes first when there is room again.
    assert [sequence.id for sequence in scheduler.waiting] == ["b", "d", "c"]
    scheduler.finish(scheduler.waiting[1])

    scheduler.finish(a)
    assert play(scheduler) == {"b": 8}  # all it knows is computed again, output included
    assert play(scheduler) == {"b": 1, "c": 4}
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
