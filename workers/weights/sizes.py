"""Bytes that parts of a model's matrices take once they are loaded, from its configuration alone."""

from outrider.workers.weights.config import ModelConfig, RoutedMlp
from outrider.workers.weights.quantization import format_of
from outrider.workers.weights.tensors import expert_prefix

# Of an element that is stored plainly, where ranks are weighed against each other before anybody has said how they
# will compute: what is served on GPUs is bfloat16.
PLAIN_BYTES = 2
ROUTER_BYTES = 4  # an element of a router's matrix, which is float32 whatever the model's dtype


def matrix_bytes(config: ModelConfig, name: str, rows: int, columns: int, plain_bytes: int) -> int:
    """Of so many rows and columns of a matrix, by its Hugging Face name.

    plain_bytes: of an element that is stored plainly.
    """
    form = format_of(config.quantization, name)
    return rows * columns * plain_bytes if form is None else form.loaded_bytes(rows, columns)


def attention_bytes(
    config: ModelConfig, layer: int, num_query_heads: int, num_kv_heads: int, plain_bytes: int
) -> int:
    """Of q, k, v (with their biases) and o of a layer, for so many heads."""
    prefix, hidden = f"model.layers.{layer}.self_attn.", config.hidden_size
    query, key = num_query_heads * config.head_dim, num_kv_heads * config.head_dim
    sizes = {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
    }
    biases = (query + 2 * key) * plain_bytes if config.qkv_bias else 0
    return biases + sum(
        matrix_bytes(config, f"{prefix}{name}.weight", *size, plain_bytes) for name, size in sizes.items()
    )


def mlp_bytes(config: ModelConfig, layer: int, num_experts: int, num_columns: int, plain_bytes: int) -> int:
    """Of gate, up and down of a layer for so many columns: of its MLP, or of each of `num_experts` experts."""
    prefix, hidden = f"model.layers.{layer}.", config.hidden_size
    routed = isinstance(config.layers[layer].mlp, RoutedMlp)
    prefix += expert_prefix(0) if routed else "mlp."
    sizes = {
        "gate_proj": (num_columns, hidden),
        "up_proj": (num_columns, hidden),
        "down_proj": (hidden, num_columns),
    }
    one = sum(
        matrix_bytes(config, f"{prefix}{name}.weight", *size, plain_bytes) for name, size in sizes.items()
    )
    return one * (num_experts if routed else 1)
