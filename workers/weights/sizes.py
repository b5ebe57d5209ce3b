"""Bytes that parts of a model's matrices take, from its configuration alone."""

from outrider.workers.weights.config import ModelConfig, RoutedMlp

# Of an element that is stored plainly, where ranks are weighed against each other before anybody has said how they
# will compute: what is served on GPUs is bfloat16.
PLAIN_BYTES = 2


def attention_bytes(config: ModelConfig, num_query_heads: int, num_kv_heads: int) -> int:
    """Of q, k, v and o of all layers, for so many heads."""
    columns = (2 * num_query_heads + 2 * num_kv_heads) * config.head_dim
    return config.num_layers * columns * config.hidden_size * PLAIN_BYTES


def bytes_per_column(config: ModelConfig) -> int:
    """Of a column of the MLPs of all layers: a row of gate and of up, a column of down, in each expert."""
    num_mlps = sum(
        layer.mlp.num_experts if isinstance(layer.mlp, RoutedMlp) else 1 for layer in config.layers
    )
    return num_mlps * 3 * config.hidden_size * PLAIN_BYTES
