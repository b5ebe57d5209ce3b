"""Target and drafter without kernels on a device that is not the CPU: nothing mixes the two, and the numbers are
those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from outrider.kernels.attention_cases import ATTENTION_CASES, attention_in_float64, build_attention_inputs
from outrider.kernels.kernel_cases import batch_to
from outrider.kernels.tree_attention import tree_attention
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.messages import Draft, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence
from outrider.workers.target_rank import TargetRank
from outrider.workers.trace import Tracer
from outrider.workers.weights.random_source import RandomSource
from support.drafting_model import small_method
from support.pretend_gpu import PretendTensor, pretend_gpu
from support.stand_in_cuda import StandInCuda

SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.3, logprobs=True, top_logprobs=2),
)


def model_and_cache(device: torch.device) -> tuple[Transformer, PagedCache]:
    source = RandomSource("random:qwen3?hidden_size=32&intermediate_size=48&num_heads=4&vocab_size=96")
    plan = ShardPlan(source.config, 0, 1)
    weights = load_weights(plan, source, torch.float32, device, packed=False)
    model = Transformer(weights, SoloCommunicator())
    return model, PagedCache(source.config, plan, 24, 4, torch.float32, device)


def test_the_guard_refuses_what_a_gpu_refuses() -> None:
    with pretend_gpu() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert isinstance(there, PretendTensor)
        assert there.device == device
        assert torch.equal((there + 1).cpu(), here + 1)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_the_fallback_of_attention_runs_on_a_gpu(case) -> None:  # type: ignore[no-untyped-def]
    # Pages that fell out of the window are there, because the reference gathers them and then masks.
    inputs = build_attention_inputs(replace(case, window=0))
    expected = attention_in_float64(case, inputs)
    with pretend_gpu() as device:
        batch = batch_to(inputs.batch, device)
        moved = (x.to(device) for x in (inputs.q, inputs.k_pages, inputs.v_pages))
        settings = (case.scale, case.window, case.soft_cap, case.value_scale)
        out = tree_attention(*moved, batch, *settings).cpu()
    assert (out.double() - expected).norm() / expected.norm() < 1e-2


def target_rounds(device: torch.device) -> list[object]:
    """Two prompts in one round, one of them sampled, then a tree and a lone root behind accepted paths."""
    model, cache = model_and_cache(device)
    rank = TargetRank(model, cache, 2, model.config.max_context, Tracer("target", False))
    starts = tuple(SequenceStart(slot, 3, 0, sampling) for slot, sampling in enumerate(SAMPLINGS))
    prompts = (
        SequenceStep(0, (), (0, 1, 2), (5, 6, 7, 8, 9), (0, 0, 1, 2, 2), 2),
        SequenceStep(1, (), (3, 4), (9, 8, 7), (0, 0, 1), 2),
    )
    later = (
        SequenceStep(0, (0, 1, 2, 4), (), (3,), (0,), 0),
        SequenceStep(1, (0, 1, 2), (5,), (1, 2, 3), (0, 0, 0), 0),
    )
    drafts = Draft(1, starts, (), Steps.of(prompts)), Draft(2, (), (), Steps.of(later))
    return [
        (scores.tokens.tolist(), scores.failed.tolist(), scores.top_ids.tolist(), scores.logprobs.tolist())
        for scores in map(rank.step, drafts)
    ]


def drafted_trees(device: torch.device) -> list[object]:
    model, cache = model_and_cache(device)
    slots = DraftedSlots(len(SAMPLINGS), 8, 4)
    drafter = small_method(slots, model, cache)
    prompt = [3 * n % 64 for n in range(40)]
    for slot, sampling in enumerate(SAMPLINGS):
        request = Request(str(slot), tuple(prompt), sampling, DraftOptions(("model",), 8, 4))
        sequence = Sequence(request, list(prompt), slot=slot)
        slots.start(sequence)
        drafter.start(sequence)
    both = np.arange(len(SAMPLINGS))
    while len(drafter.unread(both)):
        assert drafter.read(both)
    while (slots.trees.num_nodes < 8).any():
        assert drafter.expand(both)
    return [slots.trees.tokens.tolist(), slots.trees.parents.tolist()]


def is_same(found: object, expected: object) -> bool:
    """Nested lists and tuples of the same tokens, and of numbers that may be rounded otherwise: on a CPU a norm is
    other operators than on a GPU."""
    if isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple)
        return len(found) == len(expected) and all(map(is_same, found, expected))
    return found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("work", [target_rounds, drafted_trees])
def test_target_and_drafter_say_on_a_gpu_what_they_say_on_a_cpu(
    work: Callable[[torch.device], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    StandInCuda().install(monkeypatch)
    expected = work(torch.device("cpu"))
    with pretend_gpu() as device:
        assert is_same(work(device), expected)
