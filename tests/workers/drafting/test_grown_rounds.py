"""Rounds whose drafts grow on a device, a pretended one: texts are those of plain decoding, and levels follow each
other without the host where requests allow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the kernels' sources are read through the compile layer")

from outrider.cluster.bench.identity import Mismatch
from outrider.kernels.selection import ENTRIES, KernelSelection
from outrider.workers.drafting import growing_levels
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod
from outrider.workers.drafting.model import ModelMethod
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model import cuda_graphs
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.grown_steps import GrownSteps
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.sequences.tree import GrowingTrees
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.random_source import RandomSource
from support.counted_gpu import CountedGpu, counted_gpu
from support.drafted import answer, cut_of, node_at, path_of, sequence_of
from support.equality import PLAIN, Case, Reference, assert_same_texts, decode, num_accepted
from support.local_engine import LocalEngine, MethodBuilder, default_options
from support.models import random_model
from support.pretend_gpu import pretend_gpu
from support.tiny import SLOW_TARGET
from support.tiny_heads import eagle3_drafter, eagle3_method

SHAPE = "hidden_size=64&num_layers=2&num_heads=1&num_kv_heads=1&head_dim=64&vocab_size=300"
SPEC = f"random:llama?{SHAPE}"
TARGET = RandomSource(SPEC)
KERNELS = KernelSelection.of(ENTRIES)
Tree = dict[tuple[int, ...], float]
MODEL, MODEL_AND_NGRAM = DraftOptions(("model",), 12, 5), DraftOptions(("ngram", "model"), 12, 5)
EAGLE3 = DraftOptions(("eagle3",), 12, 5)
BOTH = DraftOptions(("ngram", "eagle3"), 12, 5)
PROMPTS = ((5, 6, 7, 8, 9, 10, 7, 8), tuple(range(20, 60)), (100, 3))
LAWS = (
    SamplingParams(temperature=0.0, max_tokens=9),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=9),
    SamplingParams(temperature=1.1, seed=2, max_tokens=8),
)
PENALTIES = SamplingParams(temperature=0.7, repetition_penalty=1.2, seed=3, max_tokens=8)


class OnGpu(LocalEngine):
    """Whose drafts are made on the pretended GPU."""

    def _draft(self) -> None:
        with pretend_gpu():
            super()._draft()


def cases_of(laws: tuple[SamplingParams, ...]) -> list[Case]:
    return [Case(f"{i}, {j}", prompt, law) for i, prompt in enumerate(PROMPTS) for j, law in enumerate(laws)]


def eagle3(gpu: CountedGpu) -> MethodBuilder:
    drafter = eagle3_drafter(TARGET, (0, 1, 2), head_dim=64)

    def build(slots: DraftedSlots, estimator: AcceptanceEstimator, _: ModelConfig) -> DraftMethod:
        return eagle3_method(
            slots, estimator, TARGET, drafter, 40, 4, False, gpu.device, torch.bfloat16, KERNELS
        )

    return build


def model(gpu: CountedGpu) -> MethodBuilder:
    """The target with noise."""
    source = RandomSource(f"{SPEC}&perturb=0.1")
    plan = ShardPlan(source.config, 0, 1)

    def build(slots: DraftedSlots, estimator: AcceptanceEstimator, _: ModelConfig) -> DraftMethod:
        weights = load_weights(plan, source, torch.bfloat16, gpu.device, packed=False)
        cache = PagedCache(source.config, plan, 60, 4, torch.bfloat16, gpu.device, KERNELS.kv_commit)
        return ModelMethod(
            slots=slots,
            estimator=estimator,
            model=Transformer(weights, SoloCommunicator(), KERNELS),
            cache=cache,
            pool=PagePool(60, 4, True),
            sampler=Sampler(300, VocabularyRange(0, 300), SoloCommunicator(), KERNELS),
            num_target_tokens=300,
            max_children=3,
            rows_per_sequence=4,
            max_rows=8,
            prefill_chunk=64,
            tracer=Tracer("draft model", False),
        )

    return build


@pytest.mark.parametrize(
    ("drafter", "laws", "draft", "fixed_budget"),
    [
        (eagle3, LAWS, EAGLE3, False),
        (eagle3, LAWS[1:2], BOTH, True),
        (eagle3, (LAWS[0], PENALTIES), BOTH, False),
        (model, LAWS[1:], MODEL, False),
        (model, (LAWS[1], PENALTIES), MODEL_AND_NGRAM, True),
    ],
    ids=[
        "eagle3",
        "eagle3, fixed, with lookup",
        "eagle3, penalties among them",
        "model",
        "model, fixed, with lookup, penalties among them",
    ],
)
def test_drafts_that_grow_alone_give_the_text_of_plain_decoding_and_of_transformers(
    drafter: Callable[[CountedGpu], MethodBuilder],
    laws: tuple[SamplingParams, ...],
    draft: DraftOptions,
    fixed_budget: bool,
    ties: list[Mismatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    cases, reference = cases_of(laws), Reference(random_model(SHAPE))
    with LocalEngine(TARGET) as plain:
        expected = decode(plain, cases, PLAIN)
    steps: list[int] = []
    run = GrownSteps.run
    monkeypatch.setattr(GrownSteps, "run", lambda self, num: (steps.append(num), run(self, num))[1])
    monkeypatch.setattr(cuda_graphs, "DRAFT_ROWS", (16, 64))
    with counted_gpu(monkeypatch) as gpu:
        options = default_options(fixed_budget=fixed_budget)
        with OnGpu(TARGET, methods=(drafter(gpu),), options=options, profile=SLOW_TARGET) as engine:
            found = decode(engine, cases, draft)
    for case in cases:
        assert found[case.id].tokens == expected[case.id].tokens
    assert_same_texts(reference, cases, found, ties, "grown without the host")
    assert max(steps) > 1
    assert num_accepted(found) > 0


def trees_around_a_verdict(gpu: CountedGpu, before: tuple[int, ...], after: tuple[int, ...]) -> list[Tree]:
    """By path, what the nodes of two sequences' trees are worth: grown by steps that each have so many behind them,
    cut back by a verdict that follows the best path for two tokens, and grown again."""
    slots = DraftedSlots(2, 16, 5)
    drafting = DraftEngine(slots)
    method = model(gpu)(slots, drafting.estimator, TARGET.config)
    drafting.add(method)
    both, trees = np.arange(2), drafting.trees
    for slot, law in enumerate((LAWS[0], LAWS[2])):
        drafting.start(sequence_of([5, 6, 7 + slot], slot, ("model",), 16, 5, replace(law, max_tokens=100)))
    for num in before:
        assert drafting.expand(method, both, num)
    found = [tree_of(trees, slot) for slot in (0, 1)]
    paths = [max((path for path in tree if len(path) == 2), key=lambda p, t=tree: t[p]) for tree in found]
    nodes = [[node_at(trees, slot, path[:end]) for end in (1, 2)] for slot, path in enumerate(paths)]
    sent = cut_of(trees, dict(enumerate(nodes)))
    said = [{0: path[0], first: path[1]} for path, (first, _) in zip(paths, nodes, strict=True)]
    for slot, (own, path) in enumerate(zip(said, paths, strict=True)):
        below = [longer for longer in found[slot] if len(longer) == 3 and longer[:2] == path]
        own[nodes[slot][1]] = max(below, key=lambda p, t=found[slot]: t[p])[2]
    assert [len(emitted) for emitted in answer(drafting, (0, 1), sent, said)] == [3, 3]
    for num in after:
        assert drafting.expand(method, both, num)
    return [*found, *(tree_of(trees, slot) for slot in (0, 1))]


def tree_of(trees: GrowingTrees, slot: int) -> Tree:
    return {
        tuple(path_of(trees, slot, node)): float(trees.values[slot, node])
        for node in range(int(trees.num_nodes[slot]))
    }


def test_what_a_model_has_read_without_the_host_outlives_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(cuda_graphs, "DRAFT_ROWS", (64,))
    with counted_gpu(monkeypatch) as gpu:
        with gpu.counted() as counts:
            grown = trees_around_a_verdict(gpu, (3,), (1, 1))
        assert counts.replays == 8
        monkeypatch.setattr(growing_levels.GrowingLevelMethod, "grow_by", lambda *_: None)
        by_host = trees_around_a_verdict(gpu, (0,) * 4, (0,) * 4)
    for own, other in zip(grown, by_host, strict=True):
        assert own.keys() == other.keys()
        assert list(own.values()) == pytest.approx([other[path] for path in own], rel=1e-3)
