from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.sizes import weight_bytes
from outrider.workers.weights.tensors import tensor_shapes
from support.tensor_source import TensorSource, tiny_config

META = torch.device("meta")


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
    shapes = tensor_shapes(plan.config)
    source = TensorSource(
        plan.config, {name: torch.empty(shape, device=META) for name, shape in shapes.items()}
    )
    weights = load_weights(plan, source, dtype, META, packed=False)
    storages = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors_in(weights)}
    return sum(storages.values())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mellum"])
def test_ranks_take_what_is_planned(architecture: str, size: int) -> None:
    config = tiny_config(architecture, num_heads=9, num_kv_heads=3, intermediate_size=300)
    for rank in range(size):
        plan = ShardPlan(config, rank, size)
        assert weight_bytes(plan, torch.bfloat16).total == loaded_bytes(plan, torch.bfloat16)
