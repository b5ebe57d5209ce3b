"""Every way to run a round gives transformers' greedy text, token for token, on a tiny random model."""

from itertools import product
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.draft_heads.checkpoint import read_lm_head, write_lm_head
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.slim import slim_start
from outrider.workers.draft_heads.trim import trimmed
from outrider.workers.model.draft_heads import served_head
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.training.head_source import head_of_model
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
from support.local_engine import LocalEngine, default_options
from support.thread_group import thread_group
from support.tiny import (
    FEW_TOKENS,
    GREEDY,
    LOOPS,
    METHODS,
    SLOW_TARGET,
    VOCAB_SIZE,
    loop_options,
    tiny_cases,
    tiny_drafter,
)


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
    options = loop_options(loop, budget == "fixed")
    cases = tiny_cases()
    few = cases[1:3]
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=options,
        profile=SLOW_TARGET,
        plans_early=budget == "fixed",
    ) as engine:
        spy = AheadSpy(engine)
        assert_same_texts(
            reference, cases, decode(engine, cases, PLAIN), ties, f"plain, tp {tp_size}, {loop}"
        )
        for method, draft in METHODS.items():
            what = f"{method}, tp {tp_size}, {loop}, {budget}"
            together = decode(engine, cases, draft)
            assert_same_texts(reference, cases, together, ties, f"{what}, 8 at once")
            alone = decode_singly(engine, few, draft)
            assert_same_texts(reference, few, alone, ties, f"{what}, one by one")
            assert num_accepted(together) > 0
            assert num_accepted(alone) > 0
        mixed = [PLAIN, *METHODS.values()] * 2
        assert_same_texts(
            reference, cases, decode(engine, cases, mixed), ties, f"mixed, tp {tp_size}, {loop}, {budget}"
        )
        assert (spy.num_steps > 0) == options.growth.draft_ahead
        if budget == "fixed" and options.overlapped and options.num_lanes > 1:
            assert engine.num_early > 0
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.parametrize("kind", ["trimmed", "low_rank"])
def test_a_drafter_with_another_head_gives_the_text_of_transformers(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    tmp_path: Path,
    kind: str,
) -> None:
    """Half of the tokens, those that come up among them; or all by two matrices. As `draft.head` is read."""
    full = head_of_model(tiny_drafter())
    half = torch.cat(
        (torch.arange(0, VOCAB_SIZE, 2), torch.tensor([token for token, _ in FEW_TOKENS]))
    ).unique()
    head = (
        trimmed(full, half)
        if kind == "trimmed"
        else slim_start(full, 40, torch.randn(100, full.shape.hidden_size))
    )
    write_lm_head(tmp_path, head, HeadDescription(target_vocab_size=VOCAB_SIZE), torch.float32)
    served = served_head(read_lm_head(tmp_path)[0], VOCAB_SIZE, packed=True)
    sampled = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=24)
    with LocalEngine(target, drafter, draft_head=served, profile=SLOW_TARGET) as engine:
        for sampling in (GREEDY, sampled):
            cases = tiny_cases((5, 17, 40, 130), sampling)
            texts = decode(engine, cases, METHODS["model"])
            assert_same_texts(reference, cases, texts, ties, f"{kind} head, T = {sampling.temperature}")
            assert num_accepted(texts) > 0


def test_a_budget_measured_on_a_real_target_changes_no_token(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch]
) -> None:
    cases = tiny_cases()
    for merge_lanes, draft_costs in product((False, True), (False, True)):
        options = default_options(merge_lanes=merge_lanes, draft_costs=draft_costs)
        with LocalEngine(target, drafter, options=options) as engine:
            for method, draft in METHODS.items():
                what = f"{method}, merge_lanes={merge_lanes}, draft_costs={draft_costs}"
                assert_same_texts(reference, cases, decode(engine, cases, draft), ties, what)
