"""The text does not depend on who shares, lacks, loses or gives back KV pages, nor on how a prompt is read."""

from dataclasses import replace
from itertools import pairwise

import pytest

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.drafting.model import ModelMethod
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import TokenEvent
from outrider.workers.weights.source import WeightSource
from support.equality import (
    PLAIN,
    Case,
    Reference,
    assert_same_tokens,
    decode,
    decode_singly,
    num_accepted,
)
from support.local_engine import LocalEngine, default_options
from support.thread_group import thread_group
from support.tiny import BOTH, FEW_TOKENS, GREEDY, METHODS, MODEL, NGRAM, random_tokens, tiny_cases

WARM = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias=FEW_TOKENS,
)
LOOPS = {
    "serial": default_options(overlapped=False, fixed_budget=True),
    "1 lane": default_options(num_lanes=1, fixed_budget=True),
    "2 lanes": default_options(fixed_budget=True),
}
PAGE_SIZE = 16


@pytest.mark.parametrize("prefix_sharing", [False, True])
@pytest.mark.parametrize(
    ("loop", "sampling"),
    [*((loop, GREEDY) for loop in LOOPS), ("2 lanes", WARM)],
    ids=["greedy, serial", "greedy, 1 lane", "greedy, 2 lanes", "sampled, 2 lanes"],
)
def test_sequences_computed_again_for_lack_of_pages_keep_their_text(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    loop: str,
    prefix_sharing: bool,
    sampling: SamplingParams,
) -> None:
    cases = tiny_cases(sampling=replace(sampling, max_tokens=32))
    with LocalEngine(
        target,
        drafter,
        options=LOOPS[loop],
        num_pages=20,
        prefix_sharing=prefix_sharing,
        plans_early=not sampling.is_greedy,
    ) as engine:
        for name, draft in {"plain": PLAIN, **METHODS}.items():
            texts = decode(engine, cases, draft)
            for case in cases:
                expected, actual = reference.text(case), texts[case.id].tokens
                assert_same_tokens(reference, case, expected, actual, ties, f"{name}, {loop}, 20 pages")
            assert sum(text.stats.num_recomputed for text in texts.values()) > 0
            assert draft == PLAIN or num_accepted(texts) > 0
    assert engine.pool.num_available == engine.pool.num_pages
    assert drafter_pages(engine) == engine.pool.num_pages


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("prefix_sharing", [False, True])
def test_prompts_that_share_a_prefix_share_its_pages(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    tp_size: int,
    prefix_sharing: bool,
) -> None:
    system = tuple(random_tokens(100, 5 * PAGE_SIZE + 6))
    cases = [replace(case, prompt=system + case.prompt) for case in tiny_cases((5, 17, 40, 3, 64, 99))]
    whole = replace(cases[0], id="the same again")
    prefix = replace(cases[0], id="nothing but the prefix", prompt=system[: 5 * PAGE_SIZE])
    answered = (*cases[1].prompt, *reference.text(cases[1]), *random_tokens(101, 7))
    turn = replace(cases[1], id="the next turn", prompt=answered)
    with LocalEngine(
        target, drafter, communicators=thread_group(tp_size), prefix_sharing=prefix_sharing
    ) as engine:
        texts = decode(engine, cases[:1], BOTH)
        texts |= decode(engine, [*cases[1:], whole, prefix], BOTH)
        texts |= decode_singly(engine, [turn], MODEL)
    for case in [*cases, whole, prefix, turn]:
        what = f"tp {tp_size}, prefix_sharing={prefix_sharing}"
        assert_same_tokens(reference, case, reference.text(case), texts[case.id].tokens, ties, what)
    cached = {case_id: text.stats.num_cached_prompt_tokens for case_id, text in texts.items()}
    if not prefix_sharing:
        assert set(cached.values()) == {0}
        return
    assert cached[cases[0].id] == 0
    assert all(cached[case.id] == 5 * PAGE_SIZE for case in cases[1:])
    assert cached["the same again"] == 5 * PAGE_SIZE
    assert cached["nothing but the prefix"] == 4 * PAGE_SIZE  # its last token is always computed
    # All full pages of the first turn but what its last round left uncommitted.
    assert cached["the next turn"] >= len(cases[1].prompt)
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.parametrize(("loop", "plans_early"), [*((loop, False) for loop in LOOPS), ("2 lanes", True)])
def test_sequences_that_run_share_pages_with_those_that_join(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    loop: str,
    plans_early: bool,
) -> None:
    """More requests than slots: they join as others leave, while the owner of the shared pages still decodes."""
    system = tuple(random_tokens(100, 3 * PAGE_SIZE))
    long = Case("long", (*system, 1, 2, 3), replace(GREEDY, max_tokens=90))
    cases = [
        Case(f"prompt {i}", (*system, *random_tokens(i, 1 + 5 * i)), replace(GREEDY, max_tokens=4 + 3 * i))
        for i in range(9)
    ]
    order: list[str] = []
    with LocalEngine(
        target, drafter, options=LOOPS[loop], max_sequences=3, plans_early=plans_early
    ) as engine:
        texts = decode(engine, [long, *cases], NGRAM, lambda event: order.append(event.request_id))
    for case in [long, *cases]:
        assert_same_tokens(reference, case, reference.text(case), texts[case.id].tokens, ties, loop)
    joined_late = [case for case in cases if order.index(case.id) > order.index(cases[0].id) + 3]
    assert joined_late
    assert all(texts[case.id].stats.num_cached_prompt_tokens == 3 * PAGE_SIZE for case in cases[5:])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("chunk", [7, 32])
def test_long_prompts_are_read_in_chunks_beside_short_ones(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    loop: str,
    chunk: int,
) -> None:
    cases = tiny_cases((4, 333, 9, 250))
    events: list[TokenEvent] = []
    with LocalEngine(
        target,
        drafter,
        options=LOOPS[loop],
        prefill_chunk=chunk,
        max_round_tokens=48,
        plans_early=chunk == 7,
    ) as engine:
        texts = decode(engine, cases, BOTH, events.append)
    for case in cases:
        what = f"{loop}, chunks of {chunk}"
        assert_same_tokens(reference, case, reference.text(case), texts[case.id].tokens, ties, what)
    began = {case.id: [e.request_id for e in events].index(case.id) for case in cases}
    # The short ones went on while the long ones were read.
    for short, long in ((cases[0], cases[1]), (cases[2], cases[3])):
        assert sum(e.request_id == short.id for e in events[: began[long.id]]) > 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_cancelled_request_frees_its_pages_within_a_round_and_disturbs_nobody(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    loop: str,
    tp_size: int,
) -> None:
    lengths = (5, 17, 40, 200, 3, 64, 99, 30)
    cases = tiny_cases(lengths, replace(GREEDY, max_tokens=30))
    # The shortest prompts take the four slots: while the 17 tokens are read, the 200 wait; the 40 decode later.
    decoding, reading, waiting = cases[2], cases[1], cases[3]
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=LOOPS[loop],
        max_sequences=4,
        prefill_chunk=16,
        prefix_sharing=False,
        plans_early=tp_size == 2,
    ) as engine:
        canceller = Canceller(engine, {decoding.id: 6, reading.id: 0, waiting.id: 0})
        texts = decode(engine, cases, BOTH)
    for case in cases:
        text, expected = texts[case.id], reference.text(case)
        if case in (decoding, reading, waiting):
            assert text.finish_reason == "cancelled"
            expected = expected[: len(text.tokens)]
        assert_same_tokens(reference, case, expected, text.tokens, ties, f"{loop}, others cancelled")
    assert 6 <= len(texts[decoding.id].tokens) < 30
    assert texts[reading.id].tokens == texts[waiting.id].tokens == ()
    canceller.check_prompt_release()
    assert engine.pool.num_available == engine.pool.num_pages
    assert drafter_pages(engine) == engine.pool.num_pages


class Canceller:
    """Cancels requests out of the loop's own thread, where it is known which rounds follow."""

    def __init__(self, engine: LocalEngine, after_tokens: dict[str, int]) -> None:
        self._engine = engine
        self._left = after_tokens
        self._sent: list[list[str]] = []  # per round: the requests in it
        self._num_sent_at_cancel: dict[str, int] = {}
        self._num_sent_at_end: dict[str, int] = {}
        self._emit, self._send = engine.loop._emit, engine.loop._send
        engine.loop._emit = self.emit
        engine.loop._send = self.send  # type: ignore[method-assign]

    def send(self, lane, steps):  # type: ignore[no-untyped-def]
        self._sent.append([step.sequence.id for step in steps])
        return self._send(lane, steps)

    def emit(self, event: TokenEvent) -> None:
        if event.request_id in self._left:
            self._left[event.request_id] -= len(event.tokens)
        for request_id, left in self._left.items():
            if left <= 0 and request_id not in self._num_sent_at_cancel:
                self._num_sent_at_cancel[request_id] = len(self._sent)
                self._engine.loop.cancel(request_id)
        if event.finish_reason == "cancelled":
            self._num_sent_at_end[event.request_id] = len(self._sent)
            self._check_pages(event.request_id)
        self._emit(event)

    def check_prompt_release(self) -> None:
        """No cancelled request was in a later round, and its end came with the next verdict at the latest."""
        for request_id, num_sent in self._num_sent_at_cancel.items():
            assert not any(request_id in round_ids for round_ids in self._sent[num_sent:])
            assert self._num_sent_at_end[request_id] - num_sent <= 2  # one round per lane

    def _check_pages(self, request_id: str) -> None:
        scheduler, pool = self._engine.loop.scheduler, self._engine.pool
        assert scheduler.find(request_id) is None
        held = [page for sequence in scheduler.running for page in sequence.pages]
        assert pool.num_available + len(held) == pool.num_pages
        assert all(a != b for a, b in pairwise(sorted(held)))


def drafter_pages(engine: LocalEngine) -> int:
    """Free pages of the draft model's cache."""
    (drafter,) = [method for method in engine.drafting.methods if isinstance(method, ModelMethod)]
    return drafter._rows.pool.num_available
