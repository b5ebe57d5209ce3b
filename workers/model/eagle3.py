"""The EAGLE-3 drafter over its own paged cache, for rows of many trees at once."""

import torch
from torch import Tensor

from outrider.kernels.rope_append import rope_append
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.kernels.tree_attention import tree_attention
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, Eagle3Shape
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.embedding import Embedding
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.weights.config import DenseMlp, LayerConfig, ModelConfig


def layer_config(shape: Eagle3Shape) -> ModelConfig:
    """The drafter as a model of one layer, which is what its cache and its positions are made for."""
    return ModelConfig(
        architecture="llama",
        layers=(LayerConfig(0, shape.rope, DenseMlp(shape.intermediate_size)),),
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.rms_norm_eps,
        max_context=shape.max_context,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )


class CachedEagle3:
    """What the drafter's modules compute, with attention over pages."""

    def __init__(
        self,
        drafter: Eagle3Drafter,
        embedding: Embedding,
        cache: PagedCache,
        kernels: KernelSelection = REFERENCES,
    ) -> None:
        """`drafter`: as `for_serving` gives it; `embedding`: the target's; `cache`: of `layer_config`."""
        self.drafter = drafter
        self.shape = drafter.shape
        self.cache = cache
        self.device, self.dtype = cache.kv.device, cache.kv.dtype
        self._embedding = embedding
        self._kernels = kernels
        self._rope = RotaryEmbedding(layer_config(self.shape), self.shape.rope, self.dtype, self.device)

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

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = rope_append(q, k, v, *rotation, batch.kv_rows, k_pages, v_pages, self._kernels.rope_append)
            scale = self.shape.head_dim**-0.5
            out = tree_attention(
                q, k_pages, v_pages, batch.tree, scale, use_kernel=self._kernels.tree_attention
            )
            return out.flatten(1)

        embedded = self._embedding.rows(batch.tokens, self._kernels.gather_rows)
        return self.drafter(embedded.to(self.device), features, attend)

    @torch.inference_mode()
    def logits(self, output: Tensor) -> Tensor:
        """Output rows [M, hidden] -> float32 [M, V'] of the token after each."""
        return self.drafter.logits(output).float()
