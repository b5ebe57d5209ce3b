"""What `outrider plan` says, against what the engine takes and what others have measured."""

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from outrider.cluster.cli.main import app
from outrider.configs.loader import load_config, preset_names
from outrider.configs.schema import Config
from outrider.kernels.sample_shard import SUMS, WINNER
from outrider.kernels.selection import REFERENCES
from outrider.workers.first_gpu.trees import chain, trees_of
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.batch import build_batch
from outrider.workers.model.cache import CacheScales, PagedCache
from outrider.workers.model.cuda_graphs import target_capacities
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.static_batch import ROOM_BYTES, StaticBatch
from outrider.workers.model.transformer import Transformer
from outrider.workers.model.whole_rounds import extras_of
from outrider.workers.planning import gpus
from outrider.workers.planning.activations import forward_bytes, gathered_bytes, logits_bytes
from outrider.workers.planning.deployment import Models, plan_memory
from outrider.workers.planning.heads import heads_of
from outrider.workers.planning.processes import GRAPH_BYTES_PER_LAYER, graph_bytes, whole_round_bytes
from outrider.workers.setup import cache_dtype, target_cache, torch_dtype
from outrider.workers.weights import resolver
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.shipped import describe_model, shipped_config, shipped_models
from support.plan_tables import PAGE, with_tables

GIB = 1 << 30
runner = CliRunner()


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are for the GPUs of the configuration."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def models_of(config: Config) -> Models:
    target, said_by = describe_model(config.target.model, Path(), "target.model")
    if "model" not in config.draft.methods:
        return Models(target, said_by, None, "")
    return Models(target, said_by, *describe_model(config.draft.model, Path(), "draft.model"))


def plan_of(preset: str, *overrides: str) -> Any:
    config = load_config(preset, list(overrides))
    return plan_memory(config, models_of(config), config.deploy.gpu_memory_bytes)


@pytest.mark.parametrize("preset", [name for name in preset_names() if "h100" in name or "mellum" in name])
def test_presets_for_gpus_fit(preset: str) -> None:
    planned = plan_of(preset)
    assert planned.problems == ()
    assert all(device.free_bytes > 0 for device in planned.devices)


def test_a_405b_drafts_on_the_eighth_gpu_or_beside_a_rank() -> None:
    apart, shared = plan_of("llama3-405b-h100x8"), plan_of("llama3-405b-h100x8-shared")
    assert [[p.name for p in device.processes] for device in apart.devices] == [
        *([f"target {rank}"] for rank in range(7)),
        ["draft"],
    ]
    assert [[p.name for p in device.processes] for device in shared.devices] == [
        ["target 0", "draft"],
        *([f"target {rank}"] for rank in range(1, 8)),
    ]
    assert {process.kv_tokens >= 16384 for process in apart.processes + shared.processes} == {True}


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("size", [1, 3])
def test_caches_are_as_large_as_planned(size: int, cache: str) -> None:
    spec = "random:llama?num_heads=9&num_kv_heads=3&hidden_size=144"
    overrides = [f"target.model={spec}", f"target.tp_size={size}", f"target.kv_cache_dtype={cache}"]
    config = load_config("tiny-random", [*overrides, "target.kv_cache_bytes=3MiB", "draft.methods=[]"])
    source = RandomSource(spec)
    planned = plan_memory(config, Models(source.config, "", None, ""), GIB)
    for rank, process in enumerate(planned.processes[:-1]):
        plan, dtype = ShardPlan(source.config, rank, size), torch_dtype(config.target.dtype)
        weights = load_weights(plan, source, dtype, torch.device("cpu"), packed=False)
        scales = [CacheScales()] * source.config.num_layers
        kept = target_cache(config, weights, scales, REFERENCES)
        assert kept.kv.nbytes == process.kv_cache
        assert kept.num_pages * kept.page_size == process.kv_tokens
        assert kept.kv.dtype == cache_dtype(config, source.config)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made while this is on held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors(args) + _tensors((kwargs or {}).values())}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out if isinstance(out, list | tuple) else (out,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._seen:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self._seen[storage._cdata] = weakref.finalize(
                    storage, self._freed, storage._cdata, storage.nbytes()
                )
        return out

    def _freed(self, key: int, num_bytes: int) -> None:
        del self._seen[key]
        self.now -= num_bytes


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("llama?hidden_size=64&intermediate_size=1024&num_layers=3", 1),
        ("llama?hidden_size=256&intermediate_size=64&num_heads=9&num_kv_heads=3&head_dim=64", 2),
        ("mellum?hidden_size=64&expert_size=256&num_experts=4&experts_per_token=2", 1),
    ],
)
def test_a_forward_holds_no_more_than_planned_and_not_much_less(spec: str, size: int) -> None:
    """On the reference kernels, whose gathered keys and masks are part of the plan; its float32 counts double."""
    source, num_rows, dtype = RandomSource(f"random:{spec}"), 256, torch.float32
    plan, cpu = ShardPlan(source.config, 0, size), torch.device("cpu")
    model = Transformer(load_weights(plan, source, dtype, cpu, packed=False), SoloCommunicator(), REFERENCES)
    cache = PagedCache(source.config, plan, 20, 16, dtype, cpu)
    batch = build_batch(*trees_of([range(20)], 16, chain(num_rows), [1] * num_rows), cpu)
    model.forward(batch, cache)  # what a batch works out once, it has
    with LiveBytes() as live, torch.inference_mode():
        hidden = model.forward(batch, cache)
    planned = forward_bytes(plan, num_rows, dtype, 0) + gathered_bytes(plan, num_rows, 272, dtype, dtype)
    assert planned / 3 < live.peak <= planned  # experts are computed one by one here, together on a GPU
    with LiveBytes() as live, torch.inference_mode():
        model.logits_of(hidden.last, torch.arange(100))
    assert live.peak <= logits_bytes(plan, 100, dtype)


def test_graphs_have_the_inputs_that_are_planned() -> None:
    config = shipped_config(shipped_models()["meta-llama/Llama-3.3-70B-Instruct"])
    plan, pages = ShardPlan(config, 0, 7), SimpleNamespace(num_pages=2048, page_size=16)
    capacities = target_capacities(plan, pages, 32768)
    made = [StaticBatch(capacity, 16, torch.device("cpu")).batch for capacity in capacities]
    inputs = sum(
        t.nbytes for batch in made for part in (batch, vars(batch.tree).values()) for t in _tensors(part)
    )
    without = graph_bytes(plan, capacities, 16, torch.bfloat16, 0, with_logits=False)
    logits = graph_bytes(plan, capacities, 16, torch.bfloat16, 0, with_logits=True) - without
    pool = forward_bytes(plan, 256, torch.bfloat16, 0) + len(capacities) * ROOM_BYTES
    kept = (8 + 16 + 32 + 64 + 128 + 256) * len(plan.vocab) * 4
    assert kept < logits < 2 * kept
    assert 0 <= without - (inputs + pool + len(capacities) * 80 * GRAPH_BYTES_PER_LAYER) < 4096  # alignment
    assert without >= inputs + pool + len(capacities) * 80 * GRAPH_BYTES_PER_LAYER
    whole = [
        StaticBatch(capacity, 16, torch.device("cpu"), extras_of(capacity.num_rows))
        for capacity in capacities
    ]
    added = sum(static.num_bytes for static in whole) - (inputs + len(capacities) * ROOM_BYTES)
    answers = (8 + 16 + 32 + 64 + 128 + 256) * (SUMS.itemsize + WINNER.itemsize + 128 * 8)
    assert 0 <= added + answers - whole_round_bytes(plan, capacities) < 4096  # alignment of the inputs


def run(*arguments: str) -> Any:
    return runner.invoke(app, ["plan", *arguments])


def test_the_command_prints_a_table_and_bytes_for_machines() -> None:
    shown, record = run("llama3-70b-h100x8"), json.loads(run("llama3-70b-h100x8", "--json").stdout)
    assert shown.exit_code == 0
    assert "141" not in shown.stdout  # of one copy; KV heads are on two ranks
    assert "143.1 GB of weights over 7 ranks" in shown.stdout
    assert record["fits"]
    assert record["would_fit"] == []
    for device in record["devices"]:
        assert device["used_bytes"] == sum(sum(p["bytes"].values()) for p in device["processes"])
        assert f"{device['used_bytes'] / GIB:.2f}" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "would"),
    [
        (
            ["llama3-405b-h100x8", "target.model=meta-llama/Llama-3.1-405B-Instruct"],
            ["target.model=meta-llama/Llama-3.1-405B-Instruct-FP8", "target.tp_size=15 deploy.num_nodes=2"],
        ),
        (["llama3-70b-h100x8", "target.tp_size=1"], ["target.tp_size=7"]),
        (
            ["llama3-70b-h100x8", "target.kv_cache_bytes=60GiB"],
            ["target.kv_cache_dtype=fp8", "target.kv_cache_bytes="],
        ),
        (["llama3-405b-h100x8-shared", "draft.kv_cache_bytes=12GiB"], ["draft.kv_cache_bytes="]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(arguments: list[str], would: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert f"{arguments[0]} does not fit: GPU" in line
    assert all(text in line for text in would)
    for changes in line.partition("; what would fit: ")[2].split(", or "):
        assert plan_of(arguments[0], *arguments[1:], *changes.split()).fits, changes


def test_the_document_has_what_the_command_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python tests/support/plan_tables.py"


def test_the_gpu_of_this_machine_counts_where_the_deployment_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "smallest_gpu", lambda: (24 << 30, "RTX 4090"))
    here = run("llama3-70b-h100x8")
    assert "A GPU has 24.0 GiB (RTX 4090)." in here.stdout
    assert here.exit_code == 2
    assert run("llama3-70b-h100x8", "cluster.ray_address=auto").exit_code == 0


def test_gpus_that_are_not_there_are_missed() -> None:
    assert (
        "9 GPUs are needed, deploy.num_nodes * deploy.gpus_per_node are 8"
        in plan_of("llama3-70b-h100x8", "target.tp_size=8").problems
    )
    assert (
        "9 GPUs are needed, deploy.num_nodes * deploy.gpus_per_node are 8"
        in plan_of("llama3-70b-h100x8", "draft.tp_size=2").problems
    )


def test_ranks_of_the_drafter_are_apart_or_each_beside_a_rank_of_the_target() -> None:
    def names(*overrides: str) -> list[list[str]]:
        planned = plan_of("llama3-70b-h100x8", *overrides)
        assert planned.problems == ()
        return [[process.name for process in device.processes] for device in planned.devices]

    assert names("target.tp_size=6", "draft.tp_size=2", "target.kv_cache_bytes=30GiB")[6:] == [
        ["draft"],
        ["draft 1"],
    ]
    shared = ["target.tp_size=8", "target.kv_cache_bytes=20GiB", "draft.placement=shared"]
    small = ["cluster.num_gpus_per_draft=0.2", "draft.kv_cache_bytes=5GiB"]
    assert names(*shared, *small, "draft.tp_size=3") == [
        ["target 0", "draft"],
        ["target 1", "draft 1"],
        ["target 2", "draft 2"],
        *([f"target {rank}"] for rank in range(3, 8)),
    ]
    whole = plan_of("llama3-70b-h100x8", *shared, *small).processes[-1]
    parts = plan_of("llama3-70b-h100x8", *shared, *small, "draft.tp_size=4").processes[-4:]
    assert sum(part.weights.total for part in parts) == pytest.approx(whole.weights.total, rel=0.01)
    assert all(part.kv_tokens == 4 * whole.kv_tokens for part in parts)


def test_nothing_is_fetched_for_a_model_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(resolver, "_from_hub", refuse)
    for model in shipped_models():
        config, said_by = describe_model(model, Path(), "target.model")
        assert config.num_layers > 20
        assert said_by == f"the package's sizes of {model}"


def test_a_folder_is_read_where_there_is_one(tmp_path: Path) -> None:
    described = json.loads(shipped_models()["Qwen/Qwen3-8B"].read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 3}))
    config, said_by = describe_model(str(tmp_path), tmp_path, "target.model")
    assert (config.num_layers, said_by) == (3, str(tmp_path))


def test_heads_are_counted_where_they_are() -> None:
    planned = plan_of("quickstart", "target.model=Qwen/Qwen3-0.6B", "draft.methods=[ngram]")
    assert planned.processes[-1].heads == 0
    head = ["draft.dtype=bfloat16", "draft.methods=[eagle3]"]
    config = load_config("quickstart", [*head, "draft.eagle3.model=org/heads"])
    found = heads_of(config, shipped_config(shipped_models()["Qwen/Qwen3-0.6B"]))
    assert found.unknown == ("the weights of draft.eagle3.model, which are not on this machine",)
    shipped = load_config("quickstart", [*head, "draft.device=cpu"])
    assert heads_of(shipped, shipped_config(shipped_models()["Qwen/Qwen3-0.6B"])).num_bytes > 15e6


def test_graphs_of_heads_are_counted_where_their_steps_are_graphs() -> None:
    head = ["target.model=Qwen/Qwen3-0.6B", "draft.methods=[eagle3]"]
    gpu = ["cluster.num_gpus_per_draft=1", "cluster.num_gpus_per_target=1", "draft.placement=separate"]
    config = load_config("quickstart", [*head, "draft.dtype=bfloat16"])
    (drafter,) = heads_of(config, models_of(config).target).stepping
    assert (drafter.num_layers, drafter.vocab_size) == (1, 8192)

    def graphs(*overrides: str) -> int:
        drafting: int = plan_of("quickstart", *head, *overrides).processes[-1].graphs
        return drafting

    assert graphs() == graphs(*gpu, "draft.device=cpu") == graphs(*gpu, "target.attention=sdpa") == 0
    counted = graphs(*gpu, "draft.dtype=bfloat16")
    assert 4 * GRAPH_BYTES_PER_LAYER < counted < 64 << 20
    more = graphs(*gpu, "draft.dtype=bfloat16", "tree.max_nodes=64", "rounds.max_sequences=64")
    assert more > counted + 64 * 8 * 32 * drafter.hidden_size
    assert graphs(*gpu, "draft.dtype=float32") == 0
