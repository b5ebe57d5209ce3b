"""Bytes of what a forward holds beside weights and cache, at its fullest moment."""

import torch

from outrider.workers.model.mlp import aligned_columns
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import RoutedMlp

FLOAT32_BYTES = 4


def forward_bytes(plan: ShardPlan, num_rows: int, dtype: torch.dtype, num_taps: int) -> int:
    """Of a forward of so many rows on one rank, with the inputs of `num_taps` layers kept.

    Tensors of `Transformer.forward` that live at the same time, where the most do: in attention or in the MLP of the
    layer that takes most. The residual rows before and after a sum over ranks, and the normed rows, are there always.
    """
    config, size = plan.config, dtype.itemsize
    hidden = num_rows * config.hidden_size * size
    head = num_rows * config.head_dim * size
    num_queries, num_places = len(plan.query_heads), plan.num_query_places
    projected = (num_queries + 2 * plan.num_kv_heads) * head
    # Queries turned, put in their places, attended, and out of these places again.
    attention = projected + num_queries * head + 2 * num_places * head + num_queries * head
    mlp = max(_mlp_bytes(plan, index, num_rows, size) for index in range(config.num_layers))
    return (3 + num_taps) * hidden + max(attention, mlp)


def gathered_bytes(
    plan: ShardPlan, num_rows: int, num_keys: int, dtype: torch.dtype, cache: torch.dtype
) -> int:
    """Of attention by torch's SDPA: the keys and values of all sequences together, out of their pages and in the
    queries' dtype, and a mask of each row."""
    keys = 2 * num_keys * plan.num_kv_heads * plan.config.head_dim
    return keys * (cache.itemsize + dtype.itemsize) + num_rows * num_keys * dtype.itemsize


def logits_bytes(plan: ShardPlan, num_sampled: int, dtype: torch.dtype) -> int:
    """Of the logits of so many rows of a forward, which go from the model's dtype to float32."""
    rows = 2 * num_sampled * plan.config.hidden_size * dtype.itemsize
    return rows + num_sampled * len(plan.vocab) * (dtype.itemsize + FLOAT32_BYTES)


def _mlp_bytes(plan: ShardPlan, index: int, num_rows: int, size: int) -> int:
    """Gates and ups, SiLU of the gates, their product; then the output beside the first and the last."""
    mlp, hidden = plan.config.layers[index].mlp, plan.config.hidden_size
    if not isinstance(mlp, RoutedMlp):
        columns = len(plan.mlp_columns(mlp.intermediate_size))
        return num_rows * size * max(4 * columns, 3 * columns + hidden)
    # The rows of all experts that they visit, as if all were this rank's; the sum is float32.
    visits, columns = num_rows * mlp.experts_per_token, aligned_columns(len(plan.expert_columns(mlp)))
    products = size * (hidden + max(4 * columns, 3 * columns + hidden))
    return visits * (products + 2 * FLOAT32_BYTES * hidden) + num_rows * mlp.num_experts * FLOAT32_BYTES
