"""A draft head of one layer on the target's hidden rows, over its own paged cache, for rows of many trees at once."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from outrider.kernels.rope_append import rope_append
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.kernels.tree_attention import tree_attention
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.embedding import Embedding
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.weights.config import ModelConfig


class FeatureDrafter(Protocol):
    """What a row reads is a token and the feature of the position before it: the target's, or the drafter's output.

    `Eagle3Drafter`, `MtpDrafter`, with their matrices as `for_serving` makes them.
    """

    @property
    def model(self) -> ModelConfig:
        """The drafter as a model of one layer, which is what its cache and its positions are made for."""
        ...

    def features(self, taps: Tensor) -> Tensor:
        """The target's rows [N, taps * target_hidden_size] side by side -> features [N, hidden]."""
        ...

    def __call__(
        self, embedded: Tensor, features: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """-> [N, hidden], which stand in for the target's own features at those tokens."""
        ...

    def logits(self, output: Tensor) -> Tensor:
        """[M, hidden] -> [M, V'] of the token after each."""
        ...


class CachedDrafter:
    """What a drafter's modules compute, with attention over pages."""

    def __init__(
        self,
        drafter: FeatureDrafter,
        embedding: Embedding,
        cache: PagedCache,
        kernels: KernelSelection = REFERENCES,
    ) -> None:
        """`embedding`: the target's; `cache`: of the drafter's `model`."""
        self.drafter = drafter
        self.model = drafter.model
        self.cache = cache
        self.device, self.dtype = cache.kv.device, cache.kv.dtype
        self.embedding, self.kernels = embedding, kernels
        self._rope = RotaryEmbedding(self.model, self.model.layers[0].rope, self.dtype, self.device)

    @property
    def config(self) -> ModelConfig:
        """Of its layer, as a model."""
        return self.model

    @torch.inference_mode()
    def features(self, taps: Tensor) -> Tensor:
        """The target's rows [N, taps * target_hidden_size] side by side -> features [N, hidden]."""
        return self.drafter.features(taps.to(self.device, self.dtype))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, features: Tensor) -> Tensor:
        """Rows of tokens and the features [N, hidden] of the positions before them -> output [N, hidden], which
        stands in for the target's own features at those tokens; keys and values are written to the cache."""
        rotation = self._rope(batch.positions)
        k_pages, v_pages = self.cache.keys(0), self.cache.values(0)
        scale, window = self.model.head_dim**-0.5, self.model.layers[0].window

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = rope_append(
                q, k, v, *rotation, batch.kv_rows, k_pages, v_pages, use_kernel=self.kernels.rope_append
            )
            out = tree_attention(
                q, k_pages, v_pages, batch.tree, scale, window, use_kernel=self.kernels.tree_attention
            )
            return out.flatten(1)

        embedded = self.embedding.rows(batch.tokens, self.kernels.gather_rows)
        return self.drafter(embedded.to(self.device), features, attend)

    @torch.inference_mode()
    def logits(self, output: Tensor) -> Tensor:
        """Output rows [M, hidden] -> float32 [M, V'] of the token after each."""
        return self.drafter.logits(output).float()
