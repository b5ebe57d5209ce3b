"""GGUF metadata to ModelConfig, by way of the config.json that the same model has on Hugging Face.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and `gguf.constants.Keys`.
"""

import math
from typing import Any

import numpy as np

from outrider.workers.weights.config import ModelConfig, model_config_from_hf
from outrider.workers.weights.gguf_header import GgufHeader
from outrider.workers.weights.source import DataFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# A chat model ends its turn with one of these even where the metadata name only the base model's end of text.
# llama.cpp treats them alike (`special_eog_ids` in llama-vocab.cpp).
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
)


def model_config_from_gguf(header: GgufHeader) -> ModelConfig:
    """Raises ValueError for another architecture, a missing key, or a feature that is not supported."""
    return model_config_from_hf(hf_config_dict(header))


def hf_config_dict(header: GgufHeader) -> dict[str, Any]:
    """The fields of config.json that the metadata and the tensor shapes determine."""
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{header.path} has architecture {architecture}; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{header.path} has no tensor token_embd.weight")
    if _optional(header, "expert_count", 0):
        raise ValueError(f"{header.path} is a mixture of experts; supported in GGUF: dense models")
    context = _required(header, "context_length")
    if 0 < _optional(header, "attention.sliding_window", 0) < context:
        raise ValueError(f"{header.path} uses a sliding window; supported in GGUF: full attention")
    num_heads = _required(header, "attention.head_count")
    head_dim = _optional(header, "attention.key_length", embedding.shape[1] // num_heads)
    rotated = _optional(header, "rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{header.path} rotates {rotated} of {head_dim} head dimensions; supported: all of them"
        )
    eos = end_ids(header)
    config: dict[str, Any] = {
        "model_type": architecture,
        "num_hidden_layers": _required(header, "block_count"),
        "hidden_size": embedding.shape[1],
        "intermediate_size": _required(header, "feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _optional(header, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        # The embedding may be padded beyond the vocabulary in the metadata; logits have its length.
        "vocab_size": embedding.shape[0],
        # Stored as float32; the decimal that was meant (1e-5, 1e-6) is its shortest representation.
        "rms_norm_eps": float(str(np.float32(_required(header, "attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(_optional(header, "rope.freq_base", 10000.0)),
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(eos),
        "hidden_act": "silu",
    }
    if architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    scaling = _rope_scaling(header, head_dim, config["rope_theta"], context)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def end_ids(header: GgufHeader) -> tuple[int, ...]:
    """Ids that end a text or a turn: those the metadata name, then known end-of-turn tokens it defines."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [header.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    known = [i for i, token in enumerate(tokens) if token in END_OF_TURN]
    return tuple(dict.fromkeys(i for i in (*named, *known) if i is not None))


def _required(header: GgufHeader, key: str) -> Any:
    name = f"{header.metadata['general.architecture']}.{key}"
    value = header.metadata.get(name)
    if value is None:
        raise ValueError(f"{header.path} lacks the metadata key {name}")
    if isinstance(value, list):
        raise ValueError(
            f"{header.path}: {name} differs by layer; supported in GGUF: the same for all layers"
        )
    return value


def _optional(header: GgufHeader, key: str, default: Any) -> Any:
    name = f"{header.metadata['general.architecture']}.{key}"
    return _required(header, key) if name in header.metadata else default


def _rope_scaling(header: GgufHeader, head_dim: int, theta: float, context: int) -> dict[str, Any]:
    if "rope_freqs.weight" in header.tensors:
        return llama3_scaling(_read_rope_factors(header), head_dim, theta)
    kind = _optional(header, "rope.scaling.type", "none")
    factor = float(_optional(header, "rope.scaling.factor", _optional(header, "rope.scale_linear", 1.0)))
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        attention = float(_optional(header, "rope.scaling.attn_factor", 1.0))
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(
                _optional(header, "rope.scaling.original_context_length", round(context / factor))
            ),
            "beta_fast": float(_optional(header, "rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(_optional(header, "rope.scaling.yarn_beta_slow", 1.0)),
            # llama.cpp multiplies its own 1 + 0.1 ln(factor) by attn_factor; config.json holds the product.
            "attention_factor": attention * (0.1 * math.log(factor) + 1.0),
        }
    raise ValueError(f"{header.path} has rope scaling {kind}; supported in GGUF: none, linear, yarn, llama3")


def _read_rope_factors(header: GgufHeader) -> np.ndarray:
    tensor = header.tensors["rope_freqs.weight"]
    factors = np.empty(tensor.shape[0], np.float32)
    DataFile(header.path).read_into(factors.view(np.uint8).data, tensor.offset)
    return factors.astype(np.float64)


def llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """Parameters of the Llama 3 rule that reproduce the divisors `factors` [head_dim / 2] of the frequencies.

    The converter stores divisors instead of parameters. With wavelength w_i = 2 pi theta^(2i/head_dim) the
    rule is 1 / factor_i = s_i + (1 - s_i) / factor, s_i = clamp((original / w_i - low) / (high - low), 0, 1).
    Between the clamps s_i is a line in 1 / w_i; its slope original / (high - low) and intercept
    -low / (high - low) leave one of the three free, and low = 1 as in every published model fixes it.
    Raises ValueError when no parameters fit within 1e-3.
    """
    factor = round(float(factors.max()), 4)
    if factor <= 1.0:
        return {}
    inverse_wavelength = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    low, high, original = 1.0, 4.0, 8192.0
    if between.sum() >= 2:
        slope, intercept = np.polyfit(inverse_wavelength[between], smooth[between], 1)
        fitted_high = float(1 - 1 / intercept)
        fitted_original = float(slope * (fitted_high - 1))
        # The factors are float32: within their rounding the published values are meant.
        if abs(fitted_high / high - 1) > 1e-2 or abs(fitted_original / original - 1) > 1e-2:
            high, original = fitted_high, fitted_original
    rebuilt = np.clip((original * inverse_wavelength - low) / (high - low), 0, 1)
    rebuilt = 1 / (rebuilt + (1 - rebuilt) / factor)
    if len(factors) != head_dim // 2 or np.abs(rebuilt / factors - 1).max() > 1e-3:
        raise ValueError("rope_freqs.weight does not follow the Llama 3 rule; supported in GGUF: that rule")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(original),
    }
