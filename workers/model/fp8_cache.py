"""A KV cache in FP8: half the bytes of bfloat16, a scale for the keys and one for the values of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outrider.workers.model.cache import CacheScales, PagedCache
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.scaled import FP8
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import CACHE_SCALES


def read_cache_scales(source: WeightSource) -> tuple[CacheScales, ...]:
    """Those of each layer that a checkpoint has; 1 where it was not made for a cache in FP8."""
    quantization, num_layers = source.config.quantization, source.config.num_layers
    if quantization is None or not quantization.cache_is_fp8:
        return (CacheScales(),) * num_layers
    every = slice(None)

    def read(layer: int, name: str) -> float:
        return float(source.read(f"model.layers.{layer}.{name}", every, every, torch.float32))

    return tuple(CacheScales(*(read(layer, name) for name in CACHE_SCALES)) for layer in range(num_layers))


class Fp8PagedCache(PagedCache):
    """Rows are rounded as they are written, so that a row of a tree is seen by its own query and by all that follow
    as it will be once it is committed: what a draft is checked against is what plain decoding computes.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: ShardPlan,
        num_pages: int,
        page_size: int,
        device: torch.device,
        scales: Sequence[CacheScales],
        use_kernel: bool = False,
    ) -> None:
        """As `PagedCache`; `scales`: of each layer."""
        super().__init__(config, plan, num_pages, page_size, FP8, device, use_kernel)
        assert len(scales) == config.num_layers
        self._scales = scales
        self._moved = self.kv.view(torch.uint8)  # torch does not move FP8 everywhere
