"""The drafters that read hidden rows, built from their checkpoints on a pretended GPU with the kernels: no tensor of
the CPU meets one of the GPU, and they propose what they propose on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the kernels' sources are read through the compile layer")

from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers.drafting import eagle3, feature_levels, growing_levels, medusa, mtp, parallel
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod, MethodContext, Verified, VerifiedStep
from outrider.workers.drafting.registry import METHODS
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.first_gpu.random_heads import write_heads
from outrider.workers.model import cuda_graphs, drafter_graphs
from outrider.workers.model.drafter_graphs import GraphedSteps
from outrider.workers.model.grown_steps import GrownSteps
from outrider.workers.planning.heads import heads_of
from outrider.workers.planning.processes import GRAPH_BYTES_PER_LAYER, step_graph_bytes
from outrider.workers.sequences.hidden import HiddenRows
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence
from outrider.workers.trace import Tracer
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from support.counted_gpu import counted_gpu, moved
from support.drafted import paths_of

# Heads of 64, which the kernels take.
SPEC = "random:llama?hidden_size=64&num_layers=4&num_heads=2&num_kv_heads=1&head_dim=64&vocab_size=300"
TARGET = RandomSource(SPEC)
LAWS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=1),
    SamplingParams(temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.3, logit_bias=((7, 2.0),)),
)
PROMPT = [5, 6, 7, 8, 9, 10, 7, 8]
MODULES: Mapping[str, tuple[ModuleType, ...]] = {
    "medusa": (medusa,),
    "eagle3": (eagle3, feature_levels),
    "mtp": (mtp, feature_levels),
    "parallel": (parallel,),
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    return write_heads(TARGET, tmp_path_factory.mktemp("heads"))


def configured(name: str, folder: Path) -> Config:
    return load_config(
        "tiny-random",
        [
            f"target.model={SPEC}",
            f"draft.methods=[{name}]",
            f"draft.{name}.model={folder}",
            "draft.dtype=bfloat16",
            "draft.packed_weights=false",
            f"rounds.max_sequences={len(LAWS)}",
            "tree.max_nodes=8",
        ],
    )


def built(
    name: str, folder: Path, device: torch.device, kernels: KernelSelection, slots: DraftedSlots
) -> tuple[DraftEngine, DraftMethod]:
    """A method of a checkpoint, alone in an engine."""
    config, drafting = configured(name, folder), DraftEngine(slots)
    context = MethodContext(
        config, TARGET.config, device, slots, drafting.estimator, Tracer(name, False), silent
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES[name]:
            if hasattr(module, "kernels_for"):
                patch.setattr(module, "kernels_for", lambda *_: kernels)
        if device.type == "cuda":
            patch.setattr(torch.nn.Module, "to", moved)
            patch.setattr(torch.nn.Module, "requires_grad_", lambda module, _: module)
        method = METHODS[name].build(context)
    drafting.add(method)
    return drafting, method


def proposals(
    name: str, folder: Path, device: torch.device, kernels: KernelSelection
) -> list[set[tuple[int, ...]]]:
    """The paths of each sequence's tree, behind a prompt of which the target's rows came in two rounds."""
    drafting, method = built(name, folder, device, kernels, DraftedSlots(len(LAWS), 8, 4))
    assert method.time_step(3) is not None
    sequences = []
    for slot, sampling in enumerate(LAWS):
        request = Request(str(slot), tuple(PROMPT), sampling, DraftOptions((name,), 8, 4))
        sequences.append(Sequence(request, list(PROMPT), slot=slot))
        drafting.start(sequences[-1])
    generator = torch.Generator().manual_seed(3)
    slots, none = np.arange(len(LAWS)), np.zeros(0, dtype=np.int64)
    for first, end in ((0, 4), (4, len(PROMPT) - 1)):
        count = end - first
        layers = {
            layer: torch.randn(len(LAWS) * count, 64, generator=generator).to(device) for layer in range(1, 5)
        }
        growing = np.zeros(1, dtype=np.int64) if end == len(PROMPT) - 1 else none
        steps = tuple(VerifiedStep(s, s.slot, first, np.arange(count), count, growing) for s in sequences)
        drafting.observe(Verified(steps, HiddenRows(layers, slots * 0, slots * count)))
    assert drafting.expand(method, slots)
    drafting.expand(method, slots)
    drafting.close()
    return [set(map(tuple, paths_of(drafting.trees, slot))) for slot in range(len(LAWS))]


@pytest.mark.parametrize("name", MODULES)
def test_a_drafter_proposes_on_a_gpu_what_it_proposes_on_a_cpu(
    name: str, heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = proposals(name, heads[name], torch.device("cpu"), REFERENCES)
    assert all(len(paths) > 1 for paths in on_cpu)
    with counted_gpu(monkeypatch) as gpu:
        there = proposals(name, heads[name], gpu.device, KernelSelection.of(ENTRIES))
    for own, other in zip(there, on_cpu, strict=True):
        # In bfloat16 kernels round otherwise than the references: of near ties either may be proposed.
        assert len(own) == len(other)
        assert len(own & other) >= 0.7 * len(own)


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_steps_are_the_same_from_graphs_and_without(
    name: str, heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step, with the tokens before, fits no graph of eight rows, the second does."""
    kernels = KernelSelection.of(ENTRIES)
    found = {}
    with counted_gpu(monkeypatch) as gpu:
        for graph_rows in ((), (8,), (8, 64)):
            with pytest.MonkeyPatch.context() as patch, gpu.counted() as counts:
                patch.setattr(cuda_graphs, "DRAFT_ROWS", graph_rows or (8,))
                if not graph_rows:
                    patch.setattr(feature_levels, "graphed_steps", lambda *_: None)
                found[graph_rows] = proposals(name, heads[name], gpu.device, kernels)
            assert counts.replays == len(graph_rows)
    for graph_rows in ((8,), (8, 64)):
        for own, other in zip(found[graph_rows], found[()], strict=True):
            # Products of padded rows are added up otherwise.
            assert len(own) == len(other)
            assert len(own & other) >= 0.9 * len(own)


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_graphs_of_steps_take_what_a_plan_counts(
    name: str, heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def kept_of(kind: type) -> type:
        class Kept(kind):  # type: ignore[misc]
            def __init__(self, *parts: Any) -> None:
                super().__init__(*parts)
                made.append(self)

        return Kept

    with counted_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(drafter_graphs, "GraphedSteps", kept_of(GraphedSteps))
        monkeypatch.setattr(growing_levels, "GrownSteps", kept_of(GrownSteps))
        proposals(name, heads[name], gpu.device, KernelSelection.of(ENTRIES))
    steps, grown = made
    inputs_and_logits = sum(static.num_bytes + logits.nbytes for static, _, logits in steps._graphs)
    for buffers in grown._buffers:
        inputs_and_logits += buffers.static.num_bytes
        inputs_and_logits += sum(x.nbytes for x in (*buffers.growth, *buffers.next_step))
    num_graphs = 3 * len(steps._graphs)
    kept = steps.features.nbytes + inputs_and_logits + num_graphs * GRAPH_BYTES_PER_LAYER
    config = configured(name, heads[name])
    (described,) = heads_of(config, TARGET.config).stepping
    planned = step_graph_bytes(config, described)
    # And rows that are computed with: fewer than twenty at a time, as wide as the widest.
    assert kept < planned < kept + 20 * steps.max_rows * 2 * max(300, *steps.features.shape[1:])


def grown_trees(
    name: str,
    folder: Path,
    device: torch.device,
    num_further: tuple[int, ...],
    laws: tuple[SamplingParams, ...],
) -> list[dict[tuple[int, ...], float]]:
    """By path, what the nodes of each sequence's tree are worth, after steps that each have so many behind them."""
    kernels = KernelSelection.of(ENTRIES)
    drafting, method = built(name, folder, device, kernels, DraftedSlots(len(laws), 16, 5))
    generator = torch.Generator().manual_seed(3)
    slots, count = np.arange(len(laws)), len(PROMPT) - 1
    steps = []
    for slot, sampling in enumerate(laws):
        request = Request(str(slot), tuple(PROMPT), sampling, DraftOptions((name,), 16, 5))
        sequence = Sequence(request, [*PROMPT[:-1], 3 + slot], slot=slot)
        drafting.start(sequence)
        growing = np.zeros(1, dtype=np.int64)
        steps.append(VerifiedStep(sequence, slot, 0, np.arange(count), count, growing))
    layers = {
        layer: torch.randn(len(laws) * count, 64, generator=generator).to(device) for layer in range(1, 5)
    }
    drafting.observe(Verified(tuple(steps), HiddenRows(layers, slots * 0, slots * count)))
    for num in num_further:
        assert drafting.expand(method, slots, num)
    drafting.close()
    trees = drafting.trees
    return [
        {
            tuple(trees.path(slot, node)): float(trees.values[slot, node])
            for node in range(int(trees.num_nodes[slot]))
        }
        for slot in range(len(laws))
    ]


@pytest.mark.parametrize(
    ("name", "num_further"),
    [("eagle3", (1,)), ("eagle3", (3,)), ("eagle3", (2, 0)), ("eagle3", (0, 2)), ("mtp", (3,))],
)
def test_trees_that_grow_on_the_device_are_those_that_the_host_grows(
    name: str, num_further: tuple[int, ...], heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    laws = (LAWS[0], LAWS[1], SamplingParams(temperature=1.2, seed=7))
    num_steps = len(num_further) + sum(num_further)
    with counted_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(cuda_graphs, "DRAFT_ROWS", (16, 64))
        with gpu.counted() as counts:
            grown = grown_trees(name, heads[name], gpu.device, num_further, laws)
        assert counts.replays == num_steps
        monkeypatch.setattr(growing_levels.GrowingLevelMethod, "grow_by", lambda *_: None)
        by_host = grown_trees(name, heads[name], gpu.device, (0,) * num_steps, laws)
    for own, other in zip(grown, by_host, strict=True):
        assert own.keys() == other.keys()
        for path, value in own.items():
            assert value == pytest.approx(other[path], rel=1e-4)


def test_where_no_proposal_may_have_a_row_nothing_grows(
    heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    laws = tuple(replace(law, max_tokens=2) for law in LAWS[:2])
    with counted_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(cuda_graphs, "DRAFT_ROWS", (16,))
        grown = grown_trees("eagle3", heads["eagle3"], gpu.device, (3,), laws)
        monkeypatch.setattr(growing_levels.GrowingLevelMethod, "grow_by", lambda *_: None)
        by_host = grown_trees("eagle3", heads["eagle3"], gpu.device, (0,), laws)
    assert all(max(map(len, tree)) == 1 for tree in grown)
    assert [tree.keys() for tree in grown] == [tree.keys() for tree in by_host]


def test_where_nothing_can_be_recorded_a_warning_says_why(
    heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    kernels = KernelSelection.of(ENTRIES)
    with counted_gpu(monkeypatch) as gpu, gpu.counted() as counts:
        monkeypatch.setattr(drafter_graphs, "recorded", fail)
        with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
            there = proposals("eagle3", heads["eagle3"], gpu.device, kernels)
    assert counts.replays == 0
    assert all(len(paths) > 1 for paths in there)


def test_where_levels_cannot_be_recorded_they_are_taken_one_by_one(
    heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with counted_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(cuda_graphs, "DRAFT_ROWS", (64,))
        monkeypatch.setattr(growing_levels, "GrownSteps", fail)
        with pytest.warns(UserWarning, match="one by one: out of memory"), gpu.counted() as counts:
            proposals("eagle3", heads["eagle3"], gpu.device, KernelSelection.of(ENTRIES))
    assert counts.replays == 2
