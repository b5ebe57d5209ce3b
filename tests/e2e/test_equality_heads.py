"""Draft heads on the target's hidden rows give the text of transformers, in every way to run a round."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.draft_heads.convolutions import ConvolutionShape
from outrider.workers.draft_heads.pairs import PairShape
from outrider.workers.draft_heads.parallel import BlockLayer
from outrider.workers.model.draft_heads import for_serving
from outrider.workers.model.dynamic_int8 import dynamic_int8_works
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.weights.source import WeightSource
from support import tiny_heads
from support.ahead import AheadSpy
from support.equality import PLAIN, Reference, assert_same_texts, decode, decode_singly, num_accepted
from support.local_engine import LocalEngine, MethodBuilder
from support.thread_group import thread_group
from support.tiny import BOTH, GREEDY, LOOPS, NGRAM, SLOW_TARGET, loop_options, random_tokens, tiny_cases
from support.tiny_heads import (
    building_eagle3,
    building_medusa,
    building_mtp,
    building_parallel,
    eagle3_drafter,
    mtp_drafter,
    parallel_drafter,
)

MEDUSA = DraftOptions(("medusa",), 8, 6)
EAGLE3 = DraftOptions(("eagle3",), 8, 6)
HIDDEN = 80  # of the target's rows
MARKOV = PairShape("markov", HIDDEN)
MTP = DraftOptions(("mtp",), 8, 6)
PARALLEL = DraftOptions(("parallel",), 8, 6)
HEADS = {"medusa": MEDUSA, "eagle3": EAGLE3, "mtp": MTP, "parallel": PARALLEL}
ALL = DraftOptions((*BOTH.methods, *HEADS), 12, 6)
PAGE_SIZE = 16
SAMPLED = SamplingParams(
    temperature=0.8, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.1, max_tokens=24
)


def builders(target: WeightSource) -> tuple[MethodBuilder, ...]:
    """Heads with random weights, of the inputs of both layers and what leaves the last one."""
    drafter = eagle3_drafter(target, taps=(0, 1, 2), num_ids=200, norm_before_residual=True)
    return (
        building_medusa(target),
        building_eagle3(target, drafter, num_pages=64),
        building_mtp(target, mtp_drafter(target, rank=40), num_pages=64),
        building_parallel(
            target, parallel_drafter(target, (0, 1, 2), pair=MARKOV, num_ids=200), num_pages=64
        ),
    )


OTHER_BLOCKS: dict[str, dict[str, Any]] = {
    "bidirectional, alone": {"layers": (BlockLayer(False),) * 2},
    "bidirectional, Markov, slot 0 idle": {
        "layers": (BlockLayer(False),) * 2,
        "first_slot": 1,
        "pair": MARKOV,
    },
    "windows, gated": {
        "layers": (BlockLayer(True, 12), BlockLayer(False, 9, True)),
        "pair": PairShape("gated", HIDDEN),
    },
    "selector, convolutions": {
        "layers": (BlockLayer(False),),
        "first_slot": 1,
        "pair": PairShape("selector", 8, top_k=20),
        "convolution": ConvolutionShape(2, 8),
    },
}


def combinations() -> list[ParameterSet]:
    """Each loop meets each tensor-parallel size; the fast suite has each of the sizes once."""
    found = []
    for tp_size in (1, 2, 3):
        for i, loop in enumerate(LOOPS):
            marks = () if (tp_size, i) in ((1, 5), (2, 0), (3, 4)) else (pytest.mark.slow,)
            budget = ("measured", "fixed")[(i + tp_size) % 2]
            found.append(
                pytest.param(tp_size, loop, budget, marks=marks, id=f"tp {tp_size}, {loop}, {budget}")
            )
    return found


@pytest.mark.parametrize(("tp_size", "loop", "budget"), combinations())
def test_heads_give_the_text_of_transformers(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    tp_size: int,
    loop: str,
    budget: str,
) -> None:
    options = loop_options(loop, budget == "fixed")
    cases = [*tiny_cases(), replace(tiny_cases()[1], id="one token", prompt=(7,))]
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=options,
        profile=SLOW_TARGET,
        max_sequences=len(cases),
        methods=builders(target),
        plans_early=budget == "fixed",
    ) as engine:
        spy = AheadSpy(engine)
        where = f"tp {tp_size}, {loop}, {budget}"
        for name, draft in HEADS.items():
            texts = decode(engine, cases, draft)
            assert_same_texts(reference, cases, texts, ties, f"{name}, {where}")
            assert num_accepted(texts) > 0
            alone = decode_singly(engine, cases[1:2], draft)
            assert_same_texts(reference, cases[1:2], alone, ties, f"{name} alone, {where}")
        texts = decode(engine, cases, ([PLAIN, *HEADS.values(), NGRAM, ALL] * 2)[: len(cases)])
        assert_same_texts(reference, cases, texts, ties, f"mixed, {where}")
        sampled = tiny_cases(sampling=SAMPLED)
        texts = decode(engine, sampled, ALL)
        assert_same_texts(reference, sampled, texts, ties, f"all, sampled, {where}")
        assert (spy.num_steps > 0) == options.growth.draft_ahead
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.parametrize(
    ("loop", "plans_early"),
    [("serial, 1 lane", False), ("2 lanes, ahead", False), ("2 lanes, ahead", True)],
)
def test_sequences_may_be_recomputed_cancelled_and_share_prefixes(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    loop: str,
    plans_early: bool,
) -> None:
    options = loop_options(loop, True)
    system = tuple(random_tokens(100, 2 * PAGE_SIZE + 6))
    cases = tiny_cases(sampling=replace(GREEDY, max_tokens=32))
    cases[4:6] = [replace(case, prompt=system + case.prompt) for case in cases[4:6]]
    cancelled = {cases[3].id: 5, cases[6].id: 1}
    with LocalEngine(
        target,
        drafter,
        options=options,
        num_pages=20,
        methods=builders(target),
        plans_early=plans_early,
    ) as engine:
        for name, drafts in {"mixed": ([PLAIN, *HEADS.values(), ALL] * 2)[:8], "all": [ALL] * 8}.items():
            texts = decode(engine, cases, drafts)
            assert_same_texts(reference, cases, texts, ties, f"{name}, {loop}")
            assert sum(text.stats.num_recomputed for text in texts.values()) > 0
        for draft in HEADS.values():
            texts = decode(engine, cases[4:5], draft) | decode(engine, cases[5:6], draft)
            assert_same_texts(reference, cases[4:6], texts, ties, f"shared prefix, {loop}")
            assert texts[cases[5].id].stats.num_cached_prompt_tokens > 0
        left = dict(cancelled)

        def cancelling(event) -> None:  # type: ignore[no-untyped-def]
            if event.request_id in left:
                left[event.request_id] -= len(event.tokens)
                if left[event.request_id] <= 0:
                    engine.loop.cancel(event.request_id)

        texts = decode(engine, cases, ([*HEADS.values(), ALL] * 3)[:8], cancelling)
        whole = [case for case in cases if case.id not in cancelled]
        assert_same_texts(reference, whole, texts, ties, f"{loop}, others cancelled")
        for case in cases:
            if case.id in cancelled:
                assert texts[case.id].tokens == reference.text(case)[: len(texts[case.id].tokens)]
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.skipif(not dynamic_int8_works(), reason="this build of torch has no product in 8 bits")
def test_heads_in_8_bits_give_the_text_of_transformers(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiny_heads, "for_serving", partial(for_serving, int8=True))
    cases, sampled = tiny_cases(), tiny_cases(sampling=SAMPLED)
    with LocalEngine(target, drafter, methods=builders(target), profile=SLOW_TARGET) as engine:
        for name, draft in HEADS.items():
            texts = decode(engine, cases, draft)
            assert_same_texts(reference, cases, texts, ties, f"{name} in 8 bits")
            assert num_accepted(texts) > 0
        assert_same_texts(reference, sampled, decode(engine, sampled, ALL), ties, "all in 8 bits, sampled")


@pytest.mark.parametrize("kind", OTHER_BLOCKS)
def test_blocks_of_every_kind_give_the_text_of_transformers(
    target: WeightSource, reference: Reference, ties: list[Mismatch], kind: str
) -> None:
    """Prefixes are shared and sequences recomputed: where context rows are lost, nothing is drafted."""
    drafter = parallel_drafter(target, (1, 2), **OTHER_BLOCKS[kind])
    cases = tiny_cases(sampling=replace(SAMPLED, max_tokens=20))
    with LocalEngine(
        target,
        options=loop_options("2 lanes, ahead", True),
        num_pages=24,
        methods=(building_parallel(target, drafter, num_pages=64),),
    ) as engine:
        texts = decode(engine, cases, PARALLEL)
        assert_same_texts(reference, cases, texts, ties, kind)
        assert sum(sum(text.stats.depth_drafted) for text in texts.values()) > 0
        # A selector of random weights chooses among what no slot can know.
        assert num_accepted(texts) > 0 or "selector" in kind
        again = decode(engine, cases[:2], PARALLEL)
        assert_same_texts(reference, cases[:2], again, ties, f"{kind}, shared")
    assert engine.pool.num_available == engine.pool.num_pages
