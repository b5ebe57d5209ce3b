"""Bytes of one rank's weights, from its plan alone: what `load_weights` will take."""

from dataclasses import dataclass, fields

import torch

from outrider.workers.model.mlp import aligned_columns
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import RoutedMlp
from outrider.workers.weights.sizes import ROUTER_BYTES, attention_bytes, matrix_bytes, mlp_bytes
from outrider.workers.weights.tensors import EMBEDDING, HEAD


@dataclass(frozen=True)
class WeightBytes:
    """Of one rank, by what they are for; `norms` are vectors, `mlp` includes routers. A tied head takes nothing."""

    embedding: int
    head: int
    attention: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def weight_bytes(plan: ShardPlan, dtype: torch.dtype, on_gpu: bool = False) -> WeightBytes:
    """What one rank's weights take, the head its own.

    Args:
        dtype: of what is stored plainly.
        on_gpu: experts are computed in groups there, from plain matrices with aligned columns.
    """
    config, size = plan.config, dtype.itemsize
    vocabulary, hidden = len(plan.vocab), config.hidden_size
    attention = mlp = 0
    for index, layer in enumerate(config.layers):
        attention += attention_bytes(config, index, len(plan.query_heads), plan.num_kv_heads, size)
        if isinstance(layer.mlp, RoutedMlp):
            num_experts, columns = len(plan.experts(layer.mlp)), len(plan.expert_columns(layer.mlp))
            mlp += layer.mlp.num_experts * hidden * ROUTER_BYTES
            if on_gpu:
                mlp += num_experts * 3 * aligned_columns(columns) * hidden * size
                continue
        else:
            num_experts, columns = 1, len(plan.mlp_columns(layer.mlp.intermediate_size))
        mlp += mlp_bytes(config, index, num_experts, columns, size)
    head_norms = 2 * config.head_dim if config.qk_norm else 0
    return WeightBytes(
        embedding=matrix_bytes(config, EMBEDDING, vocabulary, hidden, size),
        head=0 if config.tied_embeddings else matrix_bytes(config, HEAD, vocabulary, hidden, size),
        attention=attention,
        mlp=mlp,
        norms=(config.num_layers * (2 * hidden + head_norms) + hidden) * size,
    )
