"""Rounds of a target and steps of a drafter on the GPU that counts (`counted_gpu.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from outrider.kernels.selection import ENTRIES, KernelSelection
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod, Verified, VerifiedStep
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.messages import Draft, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.model import cuda_graphs
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sequences.hidden import HiddenRows
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence
from outrider.workers.target_rank import TargetRank
from outrider.workers.trace import Tracer
from outrider.workers.weights.random_source import RandomSource
from support.counted_gpu import CountedGpu, Counts, counted_gpu
from support.drafting_model import small_method
from support.tapped_target import HIDDEN, TAPS, TARGET
from support.tiny_heads import eagle3_drafter, eagle3_method

KERNELS = KernelSelection.of(ENTRIES)
MODEL = (
    "random:llama?hidden_size=64&intermediate_size=64&num_heads=1&num_kv_heads=1&head_dim=64&vocab_size=1000"
)
NUM_SEQUENCES, NUM_LEVELS = 2, 4
GREEDY = SamplingParams(temperature=0.0)
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top-k, top-p, min-p": SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=1),
    "top-p alone": SamplingParams(temperature=0.8, top_p=0.9, seed=1),
    "penalties": SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.3, seed=1),
    "log-probabilities": replace(GREEDY, logprobs=True, top_logprobs=5),
}


def model_and_cache(gpu: CountedGpu, num_layers: int) -> tuple[Transformer, PagedCache]:
    source = RandomSource(f"{MODEL}&num_layers={num_layers}")
    plan = ShardPlan(source.config, 0, 1)
    weights = load_weights(plan, source, torch.bfloat16, gpu.device, packed=False)
    model = Transformer(weights, SoloCommunicator(), KERNELS)
    cache = PagedCache(source.config, plan, 24, 4, torch.bfloat16, gpu.device, KERNELS.kv_commit)
    return model, cache


def target_round(gpu: CountedGpu, num_layers: int, sampling: SamplingParams) -> Counts:
    """A round of two sequences with trees of three nodes, behind accepted paths that have to move."""
    model, cache = model_and_cache(gpu, num_layers)
    rank = TargetRank(model, cache, NUM_SEQUENCES, model.config.max_context, Tracer("target", False))
    starts = tuple(SequenceStart(slot, 3, 0, sampling) for slot in range(NUM_SEQUENCES))
    pages = [tuple(range(12 * slot, 12 * slot + 12)) for slot in range(NUM_SEQUENCES)]
    prompts = [
        SequenceStep(s, (), pages[s], (5, 6, 7, 8, 9), (0, 0, 1, 2, 2), 2) for s in range(NUM_SEQUENCES)
    ]
    later = [SequenceStep(s, (0, 1, 2, 4), (), (3, 4, 5), (0, 0, 0), 0) for s in range(NUM_SEQUENCES)]
    rank.step(Draft(1, starts, (), Steps.of(prompts)))
    with gpu.counted() as counts:
        rank.step(Draft(2, (), (), Steps.of(later)))
    return counts


def drafter_step(gpu: CountedGpu, num_layers: int, sampling: SamplingParams) -> Counts:
    """The second level of two sequences' trees."""
    return _drafter_levels(gpu, num_layers, sampling, 1, 1)


def drafter_levels(gpu: CountedGpu, num_layers: int, sampling: SamplingParams) -> Counts:
    """The first `NUM_LEVELS` levels of two sequences' trees."""
    return _drafter_levels(gpu, num_layers, sampling, 0, NUM_LEVELS)


def _drafter_levels(
    gpu: CountedGpu, num_layers: int, sampling: SamplingParams, num_before: int, num_levels: int
) -> Counts:
    """So many levels, behind others."""
    model, cache = model_and_cache(gpu, num_layers)
    slots = DraftedSlots(NUM_SEQUENCES, 8, 4)
    drafting = DraftEngine(slots)
    drafter = small_method(slots, model, cache)
    drafting.add(drafter)
    for slot in range(NUM_SEQUENCES):
        prompt = [3, 5, 7 + slot]
        request = Request(str(slot), tuple(prompt), sampling, DraftOptions(("model",), 8, 4))
        drafting.start(Sequence(request, prompt, slot=slot))
    return _counted_levels(gpu, drafter, num_before, num_levels)


def feature_step(gpu: CountedGpu, num_layers: int, sampling: SamplingParams) -> Counts:
    """The second level of two sequences' trees, by an EAGLE-3 drafter."""
    return _feature_levels(gpu, sampling, 1, 1)


def feature_levels(gpu: CountedGpu, num_layers: int, sampling: SamplingParams) -> Counts:
    """The first `NUM_LEVELS` levels of two sequences' trees, by an EAGLE-3 drafter."""
    return _feature_levels(gpu, sampling, 0, NUM_LEVELS)


def _feature_levels(gpu: CountedGpu, sampling: SamplingParams, num_before: int, num_levels: int) -> Counts:
    """So many levels, behind others."""
    slots = DraftedSlots(NUM_SEQUENCES, 8, 4)
    drafting = DraftEngine(slots)
    drafter = eagle3_drafter(TARGET, TAPS, head_dim=64)
    where = (gpu.device, torch.bfloat16, KERNELS)
    method = eagle3_method(slots, drafting.estimator, TARGET, drafter, 24, 4, False, *where)
    drafting.add(method)
    steps = []
    for slot in range(NUM_SEQUENCES):
        prompt = [3, 5, 7 + slot]
        request = Request(str(slot), tuple(prompt), sampling, DraftOptions(("eagle3",), 8, 4))
        sequence = Sequence(request, prompt, slot=slot)
        drafting.start(sequence)
        steps.append(VerifiedStep(sequence, slot, 0, np.arange(2), 2, np.zeros(0, dtype=np.int64)))
    rows = torch.randn(2 * NUM_SEQUENCES, HIDDEN).to(gpu.device)
    starts = np.arange(NUM_SEQUENCES) * 2
    drafting.observe(Verified(tuple(steps), HiddenRows(dict.fromkeys(TAPS, rows), starts * 0, starts)))
    return _counted_levels(gpu, method, num_before, num_levels)


def _counted_levels(gpu: CountedGpu, method: DraftMethod, num_before: int, num_levels: int) -> Counts:
    both = np.arange(NUM_SEQUENCES)
    for _ in range(num_before):
        assert method.expand(both)
    with gpu.counted() as counts:
        while num_levels > 0:
            num_taken = method.expand_levels(both, num_levels - 1)
            assert num_taken
            num_levels -= num_taken
    return counts


WORKS: dict[str, Callable[[CountedGpu, int, SamplingParams], Counts]] = {
    "target, a round": target_round,
    "drafter, a step": drafter_step,
    "drafter, four levels": drafter_levels,
    "EAGLE-3, a step": feature_step,
    "EAGLE-3, four levels": feature_levels,
}


class RoundCounts(NamedTuple):
    """What was counted with a model of one layer."""

    by_work: dict[tuple[str, str], Counts]  # by kind of work and sampling
    per_layer: int  # launches that another layer adds to a replay


def counts_of_rounds() -> RoundCounts:
    """Of all kinds of work and samplings."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cuda_graphs, "TARGET_ROWS", (8,))
        monkeypatch.setattr(cuda_graphs, "DRAFT_ROWS", (8,))
        with counted_gpu(monkeypatch) as gpu:
            found = {
                (work, name): count(gpu, 1, sampling)
                for work, count in WORKS.items()
                for name, sampling in SAMPLINGS.items()
            }
            deeper = target_round(gpu, 2, GREEDY)
    return RoundCounts(found, deeper.replayed - found["target, a round", "greedy"].replayed)
