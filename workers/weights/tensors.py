"""Which tensors a model has, and that a checkpoint has these and no others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outrider.workers.weights.config import DenseMlp, ModelConfig, RoutedMlp
from outrider.workers.weights.quantization import StoredTensor, format_of, stem

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
ROUTER = "mlp.gate.weight"  # in a layer
# Of the rows of an FP8 cache, in a layer.
CACHE_SCALES = ("self_attn.k_scale", "self_attn.v_scale")

# Derived from the configuration, which old checkpoints carry; a head for multi-token prediction beside its model,
# which a draft method reads. transformers leaves both out of the model as well.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|mtp\..*")
_OF_QUANTISATION = re.compile(
    r"scale|zero_point|zeros|qweight|g_idx|packed|weight_shape|SCB|weight_format|absmax|quant|\.biases$"
)


@dataclass(frozen=True)
class FoundTensor:
    """A tensor of a checkpoint.

    Attributes:
        stored_as: its name in the file.
        shape: rows first.
        format: how its values are stored, as the file names it, e.g. "BF16" or "Q4_K".
        is_readable: whether its values mean something without further tensors (no scales, not packed).
    """

    stored_as: str
    shape: tuple[int, ...]
    format: str
    is_readable: bool


def is_harmless(name: str) -> bool:
    """Whether a tensor may be there although nobody reads it."""
    return _HARMLESS.fullmatch(name) is not None


def expert_prefix(expert: int) -> str:
    """What the names of an expert's matrices begin with, in a layer."""
    return f"mlp.experts.{expert}."


def mlp_prefixes(mlp: DenseMlp | RoutedMlp) -> list[str]:
    """What the names of the matrices of a layer's MLPs begin with, in the layer: one MLP, or as many as experts."""
    return [expert_prefix(i) for i in range(mlp.num_experts)] if isinstance(mlp, RoutedMlp) else ["mlp."]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of all tensors of a model; in which tensors a file keeps a quantised one is said
    by `stored_tensors`."""
    hidden = config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.tied_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for index, layer in enumerate(config.layers):
        prefix = f"model.layers.{index}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.q_proj.weight"] = (query, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (key, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (key, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, query)
        if isinstance(layer.mlp, RoutedMlp):
            shapes[prefix + ROUTER] = (layer.mlp.num_experts, hidden)
        for mlp in mlp_prefixes(layer.mlp):
            shapes[f"{prefix}{mlp}gate_proj.weight"] = (layer.mlp.intermediate_size, hidden)
            shapes[f"{prefix}{mlp}up_proj.weight"] = (layer.mlp.intermediate_size, hidden)
            shapes[f"{prefix}{mlp}down_proj.weight"] = (hidden, layer.mlp.intermediate_size)
        if config.qkv_bias:
            shapes[prefix + "self_attn.q_proj.bias"] = (query,)
            shapes[prefix + "self_attn.k_proj.bias"] = (key,)
            shapes[prefix + "self_attn.v_proj.bias"] = (key,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        if config.quantization is not None and config.quantization.cache_is_fp8:
            shapes |= {prefix + name: (1,) for name in CACHE_SCALES}
    return shapes


def stored_tensors(config: ModelConfig, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
    """The tensors that a file has for one of a model's, by their names."""
    form = format_of(config.quantization, name)
    if form is None:
        shapes = (shape, ()) if name.endswith(CACHE_SCALES) else (shape,)
        return {name: StoredTensor(shapes, None)}
    return {stem(name) + end: stored for end, stored in form.tensors(*shape).items()}


def loaded_bytes(config: ModelConfig, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a tensor of a model takes in memory where plain ones are kept in `dtype`."""
    form = format_of(config.quantization, name)
    return math.prod(shape) * dtype.itemsize if form is None else form.loaded_bytes(*shape)


def check_tensors(
    architecture: str, expected: Mapping[str, StoredTensor], found: Mapping[str, FoundTensor]
) -> None:
    """Compares a checkpoint with its configuration before anything is cut out of it.

    Args:
        architecture: what the checkpoint says it is, for messages.
        expected: by name, see `stored_tensors`.
        found: its tensors by name, harmless ones left out.

    Raises:
        ValueError: one line that names a tensor that nobody would read, that is missing, that is stored in a way
            that needs more than itself, or that has another shape.
    """
    left_over = [tensor.stored_as for name, tensor in sorted(found.items()) if name not in expected]
    if left_over:
        name = next((name for name in left_over if _OF_QUANTISATION.search(name)), left_over[0])
        reason = (
            "no quantization_config says what quantised weights they are"
            if _OF_QUANTISATION.search(name)
            else f"a {architecture} of this configuration has none of that name"
        )
        raise ValueError(f"tensor {name} would be left out: {reason}{_more(len(left_over))}")
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"has no tensor {missing[0]}{_more(len(missing))}")
    for name, tensor in sorted(found.items()):
        formats = expected[name].formats
        if formats is None and not tensor.is_readable:
            raise ValueError(
                f"tensor {tensor.stored_as} is stored as {tensor.format}, which cannot be read; "
                "readable: F64, F32, F16, BF16, what quantization_config describes, and the types of GGUF that the "
                "gguf package converts"
            )
        if formats is not None and tensor.format not in formats:
            raise ValueError(
                f"tensor {tensor.stored_as} is stored as {tensor.format}, quantization_config says "
                f"{' or '.join(formats)}"
            )
    wrong = [
        (t.stored_as, t.shape, expected[name].shapes[0])
        for name, t in sorted(found.items())
        if t.shape not in expected[name].shapes
    ]
    if wrong:
        name, got, want = wrong[0]
        raise ValueError(
            f"tensor {name} has the shape {list(got)}, the configuration says {list(want)}{_more(len(wrong))}"
        )


def _more(count: int) -> str:
    return f" ({count} such tensors)" if count > 1 else ""
