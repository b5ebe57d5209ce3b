"""A KV cache in FP8: half the bytes of bfloat16, a scale for the keys and one for the values of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.rope_append import rope_append
from outrider.kernels.tree_batch import TreeBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.scaled import FP8, FP8_MAX
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

    Attention gathers the rows and turns them into the queries' dtype: `tree_attention.cu` does not read FP8.
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
        turned = k.new_empty((2, 1, *k.shape))  # a page of keys and one of values
        rows = torch.arange(len(k), device=k.device)
        q = rope_append(q, k, v, *rotation, rows, turned[0], turned[1], use_kernel)
        scales = self._scales[layer]
        self._write(self.keys(layer), turned[0, 0], scales.keys, kv_rows)
        self._write(self.values(layer), turned[1, 0], scales.values, kv_rows)
        return q

    def attend(
        self, layer: int, q: Tensor, tree: TreeBatch, scale: float, window: int, use_kernel: bool
    ) -> Tensor:
        scales = self._scales[layer]
        out = super().attend(layer, q, tree, scale * scales.keys, window, use_kernel)
        return out if scales.values == 1.0 else out * scales.values

    def _write(self, pages: Tensor, rows: Tensor, scale: float, kv_rows: Tensor) -> None:
        rounded = (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        pages.flatten(0, 1).view(torch.uint8).index_copy_(0, kv_rows, rounded.view(torch.uint8))
