"""The paged KV cache of one worker."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.kv_commit import kv_commit
from outrider.kernels.launch_plans import MAX_COMMIT_ROWS
from outrider.kernels.rope_append import rope_append
from outrider.kernels.tree_attention import tree_attention
from outrider.kernels.tree_batch import TreeBatch
from outrider.workers.model import memory
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import ModelConfig


@dataclass(frozen=True)
class CacheScales:
    """What the rows of a layer are divided by when they are written, and multiplied with when they are read."""

    keys: float = 1.0
    values: float = 1.0


class PagedCache:
    """Keys and values of all layers in one tensor; who owns which page is decided elsewhere.

    Attributes:
        kv: [L, 2, P, PAGE, HK, D] with this rank's KV heads.
        page_size: rows in a page.
        use_kernel: whether commits run the CUDA kernel, see `kv_commit`.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: ShardPlan,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        use_kernel: bool = False,
    ) -> None:
        shape = (config.num_layers, 2, num_pages, page_size, plan.num_kv_heads, config.head_dim)
        self.page_size = page_size
        self.use_kernel = use_kernel
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        memory.prefer(self.kv)
        self.kv.zero_()
        self._moved = self.kv  # as `commit` moves it
        self._scales: Sequence[CacheScales] = (CacheScales(),) * config.num_layers
        self._keys = self.kv[:, 0].unbind(0)
        self._values = self.kv[:, 1].unbind(0)

    @property
    def num_pages(self) -> int:
        return self.kv.shape[2]

    def keys(self, layer: int) -> Tensor:
        """[P, PAGE, HK, D] of one layer."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """[P, PAGE, HK, D] of one layer."""
        return self._values[layer]

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
        """Turns q [N, Q, D] and k [N, HK, D] by their positions and writes k and v to the rows int64 [N]; the turned
        queries. See `rope_append`."""
        pages, scales = (self.keys(layer), self.values(layer)), self._scales[layer]
        return rope_append(
            q, k, v, *rotation, kv_rows, *pages, scales.keys, scales.values, use_kernel=use_kernel
        )

    def attend(
        self, layer: int, q: Tensor, tree: TreeBatch, scale: float, window: int, use_kernel: bool
    ) -> Tensor:
        """[N, HQ, D] of queries [N, HQ, D] whose rows are written. See `tree_attention`."""
        pages, scales = (self.keys(layer), self.values(layer)), self._scales[layer]
        factor = scale * scales.keys
        return tree_attention(
            q, *pages, tree, factor, window, value_scale=scales.values, use_kernel=use_kernel
        )

    def commit(self, source_rows: Tensor, target_rows: Tensor) -> None:
        """Moves accepted rows; int64 [M] each, see `kv_commit`. More than its kernel takes go without it."""
        kv_commit(
            self._moved, source_rows, target_rows, self.use_kernel and len(source_rows) <= MAX_COMMIT_ROWS
        )
