"""What is planned from a configuration alone is what ranks take once they are loaded."""

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from math import prod
from typing import Any

import pytest
import torch

from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.sizes import weight_bytes
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.safetensors_files import DTYPES
from outrider.workers.weights.shipped import shipped_config, shipped_models
from outrider.workers.weights.source import Stored, bounds
from outrider.workers.weights.tensors import tensor_shapes
from support.tensor_source import TensorSource, tiny_config, tiny_mellum

META = torch.device("meta")
MODELS = shipped_models()


class MetaSource(TensorSource):
    """The tensors of a configuration, without memory; narrow numbers and their scales as well."""

    def __init__(self, config: ModelConfig) -> None:
        shapes = tensor_shapes(config)
        super().__init__(config, {name: torch.empty(shape, device=META) for name, shape in shapes.items()})

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        assert self.config.quantization is not None
        form = self.config.quantization.format_of(name)
        assert form is not None
        shape = self.shape(name)
        parts = form.parts(bounds(rows, shape[0]), bounds(columns, shape[1]))
        tensors = {
            end: torch.empty(
                *(stop - start for start, stop in where),
                dtype=DTYPES[(stored.formats or ("F32",))[0]],
                device=META,
            )
            for (end, where), stored in zip(parts.items(), form.tensors(*shape).values(), strict=True)
        }
        values, *scales = tensors
        return Stored(tensors[values], "", {end: tensors[end] for end in scales})


def tensors_in(kept: Any) -> Iterator[torch.Tensor]:
    """Every tensor that is reached from an object's attributes."""
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, list | tuple):
        for item in kept:
            yield from tensors_in(item)
    elif is_dataclass(kept) or type(kept).__module__.startswith("outrider.workers.model"):
        for item in vars(kept).values():
            yield from tensors_in(item)


def loaded_bytes(plan: ShardPlan, dtype: torch.dtype) -> int:
    weights = load_weights(plan, MetaSource(plan.config), dtype, META, packed=False)
    # Views of one memory count once: a tied head, the experts' matrices.
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in tensors_in(weights)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def ranks_of(config: ModelConfig, size: int) -> list[ShardPlan]:
    return [ShardPlan(config, rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_ranks_take_what_is_planned(architecture: str, size: int) -> None:
    config = tiny_config(architecture, num_heads=9, num_kv_heads=3, intermediate_size=300)
    for model in (config, replace(config, tied_embeddings=True)):
        for plan in ranks_of(model, size):
            assert weight_bytes(plan, torch.bfloat16).total == loaded_bytes(plan, torch.bfloat16)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_with_experts_take_what_is_planned(size: int) -> None:
    for plan in ranks_of(tiny_mellum(), size):
        assert weight_bytes(plan, torch.bfloat16).total == loaded_bytes(plan, torch.bfloat16)


@pytest.mark.parametrize("size", [7, 8])
def test_ranks_of_the_405b_in_fp8_take_what_is_planned(size: int) -> None:
    config = shipped_config(MODELS["meta-llama/Llama-3.1-405B-Instruct-FP8"])
    by_bytes = {weight_bytes(plan, torch.bfloat16).total: plan for plan in ranks_of(config, size)}
    for num_bytes, plan in by_bytes.items():  # ranks that come to the same are loaded once
        assert loaded_bytes(plan, torch.bfloat16) == num_bytes


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03e9),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.6e9),
        ("meta-llama/Llama-3.1-405B-Instruct", 406e9),
        ("meta-llama/Llama-3.2-3B-Instruct", 3.21e9),
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("Qwen/Qwen3-8B", 8.2e9),
        ("Qwen/Qwen3-32B", 32.8e9),
        ("JetBrains/Mellum2-12B-A2.5B-Instruct", 12.15e9),
    ],
)
def test_shipped_sizes_are_those_of_the_models_cards(model: str, parameters: float) -> None:
    config = shipped_config(MODELS[model])
    assert sum(map(prod, tensor_shapes(config).values())) == pytest.approx(parameters, rel=0.01)


def test_the_405b_in_fp8_is_what_vllm_loads() -> None:
    """vllm-project/vllm#6746: "Loading model weights took 57.7520 GB" (GiB) on each of 8 ranks, in July 2024, when
    the checkpoint had every KV head twice."""
    config = shipped_config(MODELS["meta-llama/Llama-3.1-405B-Instruct-FP8"])
    (largest, *_) = (
        weight_bytes(plan, torch.bfloat16).total for plan in ranks_of(replace(config, num_kv_heads=16), 8)
    )
    assert largest / 2**30 == pytest.approx(57.752, rel=0.002)


@pytest.mark.parametrize(("size", "gib"), [(1, 14.96), (2, 7.48)])
def test_an_8b_is_what_vllm_loads(size: int, gib: float) -> None:
    """vllm-project/vllm#10511: "model weights take 14.96GiB", and 7.48 with two ranks."""
    config = shipped_config(MODELS["meta-llama/Llama-3.1-8B-Instruct"])
    assert weight_bytes(ShardPlan(config, 0, size), torch.bfloat16).total / 2**30 == pytest.approx(
        gib, abs=0.005
    )


@pytest.mark.parametrize(
    "model", ["meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-405B-Instruct-FP8"]
)
def test_seven_ranks_are_level(model: str) -> None:
    """With columns shared out evenly the fullest rank of the 405B would have 2 % more than the mean."""
    totals = [weight_bytes(plan, torch.bfloat16).total for plan in ranks_of(shipped_config(MODELS[model]), 7)]
    assert max(totals) < 1.015 * sum(totals) / 7


def test_more_heads_go_with_fewer_columns() -> None:
    config = tiny_config(num_heads=5, num_kv_heads=1, intermediate_size=4096)
    config = replace(config, hidden_size=64, head_dim=1024)
    ranks = ranks_of(config, 2)
    assert [len(plan.query_heads) for plan in ranks] == [3, 2]
    columns = [len(plan.mlp_columns(4096)) for plan in ranks]
    assert columns[0] < columns[1]
    assert sum(columns) == 4096
    assert all(count % 128 == 0 for count in columns)
    totals = [weight_bytes(plan, torch.bfloat16).total for plan in ranks]
    assert max(totals) - min(totals) <= 3 * 128 * 64 * 2 * 2
