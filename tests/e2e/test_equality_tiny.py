"""Every way to run a round gives transformers' greedy text, token for token, on a tiny random model."""

from collections.abc import Mapping
from itertools import product

import pytest
from _pytest.mark import ParameterSet

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.drafting.method import DraftMethod
from outrider.workers.rounds.budget import PassProfile
from outrider.workers.sequences.tree import Ints
from outrider.workers.weights.source import WeightSource
from support.equality import (
    PLAIN,
    Case,
    Reference,
    Text,
    assert_same_tokens,
    decode,
    decode_singly,
    num_accepted,
)
from support.local_engine import LocalEngine, default_options
from support.thread_group import thread_group
from support.tiny import METHODS, tiny_cases

# Name: loop, lanes, drafting ahead.
LOOPS = {
    "serial, 1 lane": (False, 1, False),
    "serial, 2 lanes": (False, 2, False),
    "1 lane": (True, 1, False),
    "2 lanes": (True, 2, False),
    "1 lane, ahead": (True, 1, True),
    "2 lanes, ahead": (True, 2, True),
}

# So slow a target, with rows so cheap, that a measured budget drafts as much as it may.
SLOW_TARGET = PassProfile((1, 64), (10.0, 10.01))


def combinations() -> list[ParameterSet]:
    """All of them; the fast suite runs those where each loop meets each tensor-parallel size and budget."""
    found = []
    for (i, tp_size), (j, loop), (k, budget) in product(
        enumerate((1, 2, 3)), enumerate(LOOPS), enumerate(("measured", "fixed"))
    ):
        marks = () if (i + j + k) % 2 == 0 else (pytest.mark.slow,)
        found.append(pytest.param(tp_size, loop, budget, marks=marks, id=f"tp {tp_size}, {loop}, {budget}"))
    return found


@pytest.mark.parametrize(("tp_size", "loop", "budget"), combinations())
def test_all_methods_give_the_text_of_transformers(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    tp_size: int,
    loop: str,
    budget: str,
) -> None:
    overlapped, num_lanes, draft_ahead = LOOPS[loop]
    options = default_options(
        overlapped=overlapped,
        num_lanes=num_lanes,
        draft_ahead=draft_ahead,
        fixed_budget=budget == "fixed",
    )
    cases = tiny_cases()
    few = cases[1:3]
    with LocalEngine(
        target, drafter, communicators=thread_group(tp_size), options=options, profile=SLOW_TARGET
    ) as engine:
        spy = StepSpy(engine)
        check(reference, cases, decode(engine, cases, PLAIN), ties, f"plain, tp {tp_size}, {loop}")
        for method, draft in METHODS.items():
            what = f"{method}, tp {tp_size}, {loop}, {budget}"
            together = decode(engine, cases, draft)
            check(reference, cases, together, ties, f"{what}, 8 at once")
            alone = decode_singly(engine, few, draft)
            check(reference, few, alone, ties, f"{what}, one by one")
            assert num_accepted(together) > 0
            assert num_accepted(alone) > 0
        mixed = [PLAIN, *METHODS.values()] * 2
        check(reference, cases, decode(engine, cases, mixed), ties, f"mixed, tp {tp_size}, {loop}, {budget}")
        assert (spy.num_ahead > 0) == draft_ahead
    assert engine.pool.num_available == engine.pool.num_pages


def test_a_budget_measured_on_a_real_target_changes_no_token(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch]
) -> None:
    cases = tiny_cases()
    for merge_lanes, draft_costs in product((False, True), (False, True)):
        options = default_options(merge_lanes=merge_lanes, draft_costs=draft_costs)
        with LocalEngine(target, drafter, options=options) as engine:
            for method, draft in METHODS.items():
                what = f"{method}, merge_lanes={merge_lanes}, draft_costs={draft_costs}"
                check(reference, cases, decode(engine, cases, draft), ties, what)


class StepSpy:
    """Counts drafter steps taken while the target had the sequence."""

    def __init__(self, engine: LocalEngine) -> None:
        self.num_ahead = 0
        self._drafting = engine.drafting
        self._expand = engine.drafting.expand
        engine.drafting.expand = self.expand  # type: ignore[method-assign]

    def expand(self, method: DraftMethod, slots: Ints) -> bool:
        grew = self._expand(method, slots)
        in_flight = any(self._drafting.slots.sequence(slot).in_flight for slot in slots.tolist())
        self.num_ahead += grew and in_flight
        return grew


def check(
    reference: Reference, cases: list[Case], texts: Mapping[str, Text], ties: list[Mismatch], what: str
) -> None:
    for case in cases:
        assert_same_tokens(reference, case, reference.text(case), texts[case.id].tokens, ties, what)
