"""Target and drafter call the kernels' entries with what the selection says, and pick no rows in another way."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from outrider.configs.loader import load_config
from outrider.kernels.selection import ENTRIES, KernelSelection
from outrider.workers.draft import DraftWorker
from outrider.workers.drafting import model as method_module
from outrider.workers.drafting import model_ranks
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.messages import Draft, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.model import cache as cache_module
from outrider.workers.model import mlp as mlp_module
from outrider.workers.model import transformer as transformer_module
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling import device_shard
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence
from outrider.workers.target_rank import TargetRank
from outrider.workers.trace import Tracer
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from support.drafting_model import small_method

CPU = torch.device("cpu")
CALLED = {
    "gather_rows": transformer_module,
    "rope_append": cache_module,
    "tree_attention": cache_module,
    "kv_commit": cache_module,
    "sample_shard": device_shard,
    "add_rms_norm": transformer_module,
    "silu_mul": mlp_module,
}


@pytest.fixture(params=[(), ENTRIES], ids=["references", "kernels"])
def selection(request: pytest.FixtureRequest) -> KernelSelection:
    return KernelSelection.of(request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every call of an entry; the references compute, so that float32 on a CPU will do."""
    made: dict[str, list[tuple[Any, ...]]] = {name: [] for name in CALLED}

    def recorded(name: str, entry: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, use_kernel: bool | None = None, **named: Any) -> Any:
            if use_kernel is None:
                arguments, use_kernel = arguments[:-1], arguments[-1]
            made[name].append((*arguments, use_kernel))
            return entry(*arguments, use_kernel=False, **named)

        return call

    for name, module in CALLED.items():
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return made


def model_and_cache(selection: KernelSelection) -> tuple[Transformer, PagedCache]:
    source = RandomSource("random:llama?hidden_size=32&intermediate_size=48&num_heads=4&vocab_size=96")
    plan = ShardPlan(source.config, 0, 1)
    weights = load_weights(plan, source, torch.float32, CPU, packed=False)
    model = Transformer(weights, SoloCommunicator(), selection)
    return model, PagedCache(source.config, plan, 8, 4, torch.float32, CPU, selection.kv_commit)


def flags(calls: dict[str, list[tuple[Any, ...]]]) -> dict[str, set[bool]]:
    return {name: {arguments[-1] for arguments in made} for name, made in calls.items()}


def sampled_rows(calls: dict[str, list[tuple[Any, ...]]]) -> list[list[int]]:
    """Indices of the rows of hidden states that were gathered; the others are rows of the embedding."""
    made = [(rows, index) for rows, index, _ in calls["gather_rows"] if rows.shape[0] != 96]
    assert all(index.device == rows.device for rows, index in made)
    return [index.tolist() for _, index in made]


def test_the_target_calls_the_entries(selection: KernelSelection, calls: dict[str, Any]) -> None:
    model, cache = model_and_cache(selection)
    rank = TargetRank(model, cache, 1, model.config.max_context, Tracer("target", False))
    start = SequenceStart(0, 3, 0, SamplingParams())
    tree = SequenceStep(0, (), (0, 1), (5, 6, 7, 8, 9), (0, 0, 1, 2, 2), 2)
    rank.step(Draft(1, (start,), (), Steps.of([tree])))
    rank.step(Draft(2, (), (), Steps.of([SequenceStep(0, (0, 1, 2, 4), (), (3,), (0,), 0)])))
    assert sampled_rows(calls) == [[2, 3, 4], [0]]
    expected = {name: {getattr(selection, name)} for name in CALLED}
    if not selection.sample_shard:  # the reference is called by its parts
        expected["sample_shard"] = set()
    assert flags(calls) == expected


def test_the_drafter_calls_the_entries(selection: KernelSelection, calls: dict[str, Any]) -> None:
    model, cache = model_and_cache(selection)
    slots = DraftedSlots(1, 8, 8)
    method = small_method(slots, model, cache)
    request = Request("a", (1, 2, 3), SamplingParams(max_tokens=50), DraftOptions(("model",), 8, 4))
    sequence = Sequence(request, [1, 2, 3])
    slots.start(sequence)
    method.start(sequence)
    assert method.expand(np.array([0]))
    assert sampled_rows(calls) == [[2]]  # the root, after the prompt
    called = flags(calls)
    for name in ("gather_rows", "rope_append", "tree_attention"):
        assert called[name] == {getattr(selection, name)}
    assert called["sample_shard"] == ({True} if selection.sample_shard else set())


def test_the_draft_worker_hands_its_selection_to_model_cache_and_sampler(
    selection: KernelSelection, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[KernelSelection | bool] = []

    def recorded(module: ModuleType, name: str, at: int) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: given.append(args[at]) or original(*args))

    monkeypatch.setattr(model_ranks, "kernels_for", lambda *_: selection)
    recorded(model_ranks, "Transformer", 2)
    recorded(model_ranks, "PagedCache", 6)
    recorded(method_module, "Sampler", 3)
    DraftWorker(load_config("tiny-random", [])).load(silent)
    assert given == [selection, selection.kv_commit, selection]
