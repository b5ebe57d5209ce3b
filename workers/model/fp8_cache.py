"""A KV cache in FP8: half the bytes of bfloat16, a scale for the keys and one for the values of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.rope_append import rope_append
from outrider.kernels.tree_attention import tree_attention
from outrider.kernels.tree_batch import TreeBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.scaled import FP8
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import CACHE_SCALES


@dataclass(frozen=True)
class CacheScales:
    """What the rows of a layer are divided by when they are written, and multiplied with when they are read."""

    keys: float = 1.0
    values: float = 1.0


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

    def append(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor],
        kv_rows: Tensor,
        use_kernel: bool,
    ) -> Tensor:
        pages, scales = (self.keys(layer), self.values(layer)), self._scales[layer]
        return rope_append(
            q, k, v, *rotation, kv_rows, *pages, scales.keys, scales.values, use_kernel=use_kernel
        )

    def attend(
        self, layer: int, q: Tensor, tree: TreeBatch, scale: float, window: int, use_kernel: bool
    ) -> Tensor:
        pages, scales = (self.keys(layer), self.values(layer)), self._scales[layer]
        return tree_attention(
            q,
            *pages,
            tree,
            scale * scales.keys,
            window,
            value_scale=scales.values,
            use_kernel=use_kernel,
        )
