"""Draft methods of one file each, that live on the target's hidden rows, give the same text; their rows are true."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from _pytest.mark import ParameterSet

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.weights.source import WeightSource
from support.ahead import AheadSpy
from support.equality import (
    PLAIN,
    Reference,
    assert_same_texts,
    decode,
    decode_singly,
    num_accepted,
)
from support.linear_probe import LinearProbe
from support.local_engine import LocalEngine
from support.thread_group import thread_group
from support.tiny import BOTH, GREEDY, LOOPS, NGRAM, SLOW_TARGET, loop_options, random_tokens, tiny_cases
from support.two_taps import TwoTaps

PROBE = DraftOptions((LinearProbe.name,), 8, 6)
TAPS = DraftOptions((TwoTaps.name,), 8, 6)
ALL = DraftOptions((*BOTH.methods, LinearProbe.name, TwoTaps.name), 12, 6)
NUM_TEXTS = 60  # whose rows are computed again
PAGE_SIZE = 16
TOLERANCE = 1e-4


class Toys:
    """Builds the two methods and keeps hold of them."""

    def __init__(self, num_blocks: int = 512) -> None:
        self.builders = (
            lambda slots, estimator, target: self._probe(LinearProbe(slots, estimator, target, num_blocks)),
            lambda slots, estimator, target: self._taps(TwoTaps(slots, estimator, target)),
        )

    def _probe(self, probe: LinearProbe) -> LinearProbe:
        self.probe = probe
        return probe

    def _taps(self, taps: TwoTaps) -> TwoTaps:
        self.taps = taps
        return taps

    def check_rows(self, reference: Reference) -> None:
        """All rows that were kept, against transformers' own of the whole text, position by position."""
        kept = [(tokens, rows[:, None]) for tokens, rows in self.probe.kept]
        check_rows(reference, self.probe.needs.layers, kept)
        seen = [(tokens, rows[None]) for tokens, rows in self.taps.seen.items()]
        check_rows(reference, self.taps.needs.layers, seen)
        self.probe.kept.clear()
        self.taps.seen.clear()


def check_rows(
    reference: Reference, layers: Sequence[int], found: list[tuple[tuple[int, ...], torch.Tensor]]
) -> None:
    """`found`: texts, and rows [m, num_layers, hidden] of the last m tokens of each."""
    assert found
    found = sorted(found, key=lambda entry: entry[0])
    longest = list(_longest(tokens for tokens, _ in found))
    longest = longest[:: -(-len(longest) // NUM_TEXTS)]
    for text, (hidden, _) in zip(longest, reference.rows(longest, layers), strict=True):
        prefixes = [(tokens, rows) for tokens, rows in found if tokens == text[: len(tokens)]]
        assert prefixes
        for tokens, rows in prefixes:
            own = hidden[len(tokens) - len(rows) : len(tokens)]
            torch.testing.assert_close(rows, own, atol=TOLERANCE, rtol=TOLERANCE)


def _longest(texts: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Of sorted texts those that no other one goes on."""
    before: tuple[int, ...] = ()
    for text in texts:
        if text[: len(before)] != before:
            yield before
        before = text
    yield before


def combinations() -> list[ParameterSet]:
    """Each loop meets each tensor-parallel size; the fast suite has each loop once."""
    found = []
    for tp_size in (1, 2, 3):
        for i, loop in enumerate(LOOPS):
            marks = () if i % 3 + 1 == tp_size else (pytest.mark.slow,)
            budget = ("measured", "fixed")[(i // 3 + tp_size) % 2]
            found.append(
                pytest.param(tp_size, loop, budget, marks=marks, id=f"tp {tp_size}, {loop}, {budget}")
            )
    return found


@pytest.mark.parametrize(("tp_size", "loop", "budget"), combinations())
def test_methods_that_read_hidden_rows_give_the_text_of_transformers(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    tp_size: int,
    loop: str,
    budget: str,
) -> None:
    options = loop_options(loop, budget == "fixed")
    cases, toys = tiny_cases(), Toys()
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=options,
        profile=SLOW_TARGET,
        methods=toys.builders,
        plans_early=budget == "fixed",
    ) as engine:
        spy = AheadSpy(engine)
        for name, draft in {"probe": PROBE, "taps": TAPS, "all": ALL}.items():
            texts = decode(engine, cases, draft)
            assert_same_texts(reference, cases, texts, ties, f"{name}, tp {tp_size}, {loop}, {budget}")
            assert num_accepted(texts) > 0
        alone = decode_singly(engine, cases[1:2], TAPS)
        assert_same_texts(reference, cases[1:2], alone, ties, f"alone, tp {tp_size}, {loop}, {budget}")
        toys.taps.seen.clear()
        mixed = [PLAIN, PROBE, TAPS, NGRAM, BOTH, ALL, PROBE, TAPS]
        texts = decode(engine, cases, mixed)
        assert_same_texts(reference, cases, texts, ties, f"mixed, tp {tp_size}, {loop}, {budget}")
        assert (spy.num_steps > 0) == options.growth.draft_ahead
        if options.growth.draft_ahead:
            assert toys.taps.num_survivors > 0
    toys.check_rows(reference)
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.parametrize("num_blocks", [512, 40], ids=["all kept", "some forgotten"])
@pytest.mark.parametrize("loop", ["serial, 1 lane", "2 lanes, ahead"])
def test_rows_of_recomputed_sequences_are_true(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    loop: str,
    num_blocks: int,
) -> None:
    options = loop_options(loop, True)
    cases, toys = tiny_cases(sampling=replace(GREEDY, max_tokens=32)), Toys(num_blocks)
    with LocalEngine(target, drafter, options=options, num_pages=20, methods=toys.builders) as engine:
        for name, drafts in {"mixed": [PLAIN, PROBE, TAPS, ALL] * 2, "all": [ALL] * 8}.items():
            texts = decode(engine, cases, drafts)
            assert_same_texts(reference, cases, texts, ties, f"{name}, {loop}, {num_blocks} blocks")
            assert sum(text.stats.num_recomputed for text in texts.values()) > 0
    toys.check_rows(reference)
    if num_blocks == 512:
        assert toys.probe.num_reused > 0
    assert engine.pool.num_available == engine.pool.num_pages


def test_a_prefix_is_shared_as_far_as_its_rows_are_kept(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch]
) -> None:
    system = tuple(random_tokens(100, 5 * PAGE_SIZE + 6))
    cases = [replace(case, prompt=system + case.prompt) for case in tiny_cases((5, 17, 40, 3))]
    again = [replace(case, id=f"{case.id}, later") for case in cases[:2]]
    toys = Toys(num_blocks=40)
    with LocalEngine(target, drafter, communicators=thread_group(2), methods=toys.builders) as engine:
        # A request that keeps no rows leaves pages behind; who needs rows computes them again.
        texts = decode(engine, cases[:1], BOTH)
        texts |= decode(engine, cases[1:2], PROBE)
        texts |= decode(engine, cases[2:], [ALL, NGRAM])
        cached = [texts[case.id].stats.num_cached_prompt_tokens for case in cases]
        assert cached == [0, 0, 5 * PAGE_SIZE, 5 * PAGE_SIZE]
        reused = toys.probe.num_reused
        assert reused == 5 * PAGE_SIZE
        # Other texts drive the rows out, but not the pages.
        others = [replace(case, id=f"other {case.id}") for case in tiny_cases((200, 200))]
        texts |= decode(engine, others, PROBE)
        later = decode(engine, again, [PROBE, TAPS])
        cached = [later[case.id].stats.num_cached_prompt_tokens for case in again]
        assert cached == [0, len(cases[1].prompt) // PAGE_SIZE * PAGE_SIZE]
        assert toys.probe.num_reused == reused
        texts |= later
    assert_same_texts(reference, [*cases, *others, *again], texts, ties, "shared prefixes")
    toys.check_rows(reference)
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.parametrize("loop", ["serial, 2 lanes", "2 lanes, ahead"])
def test_cancelled_requests_disturb_no_rows(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch], loop: str
) -> None:
    options = loop_options(loop, True)
    cases, toys = tiny_cases(), Toys()
    left = {cases[2].id: 5, cases[5].id: 1, cases[7].id: 1}
    with LocalEngine(
        target, drafter, options=options, max_sequences=4, prefill_chunk=16, methods=toys.builders
    ) as engine:
        emit = engine.loop._emit

        def cancelling(event) -> None:  # type: ignore[no-untyped-def]
            if event.request_id in left:
                left[event.request_id] -= len(event.tokens)
                if left[event.request_id] <= 0:
                    engine.loop.cancel(event.request_id)
            emit(event)

        engine.loop._emit = cancelling
        texts = decode(engine, cases, [ALL, PROBE, TAPS, ALL] * 2)
    whole = [case for case in cases if case.id not in left]
    assert_same_texts(reference, whole, texts, ties, f"{loop}, others cancelled")
    for case in cases:
        if case.id in left:
            assert texts[case.id].finish_reason == "cancelled"
            assert texts[case.id].tokens == reference.text(case)[: len(texts[case.id].tokens)]
    toys.check_rows(reference)
    assert engine.pool.num_available == engine.pool.num_pages
