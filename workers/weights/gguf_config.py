"""GGUF metadata to ModelConfig, by way of the config.json that the same model has on Hugging Face.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and `gguf.constants.Keys`.
"""

import math
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.data_file import DataFile
from outrider.workers.weights.families import family_named
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.gguf_header import GgufHeader
from outrider.workers.weights.hf_config import model_config_from_hf

ROPE_FACTORS = "rope_freqs.weight"

# What llama.cpp reads of a model stands under its architecture or one of these. The rest is how a file was made,
# by whom, and sampling defaults; the tokenizer is read in gguf_tokenizer.py.
_NAMESPACES = frozenset((*MODEL_ARCH_NAMES.values(), "adapter", "clip", "diffusion", "xielu"))
_HARMLESS_OF_MODEL = ("rope.scaling.finetuned",)

# What another model would do with them is not done here: their neutral values.
_OFF: dict[str, tuple[Any, ...]] = {
    "expert_shared_count": (0,),
    "expert_group_count": (0,),
    "expert_weights_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("reference",),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}

_ALL_DENSE: dict[str, tuple[Any, ...]] = {"expert_count": (0,), "expert_used_count": (0,)}

_FLOAT32_ROUNDING = 1e-6
_SOFTMAX = 1  # of `expert_gating_func`
_DEFAULT_PERIOD = 4  # of Mellum's windows: every fourth layer has none

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
    described = hf_config_dict(header)
    try:
        return model_config_from_hf(described)
    except ValueError as error:
        raise ValueError(f"{header.path}: {error}") from error


def hf_config_dict(header: GgufHeader) -> dict[str, Any]:
    """The fields of config.json that the metadata and the tensors determine; no key of the model is left out."""
    embedding = header.tensors.get("token_embd.weight")
    fields = Fields(header.metadata, f"{header.path}: ")
    fields.require_off({"general.type": ("model",), "general.quantization_version": (2,)})
    name = fields.value("general.architecture")
    family = family_named(name, f"{header.path}: general.architecture")
    arch = family.name
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{header.path} has no matrix token_embd.weight")
    off = _OFF if family.has_layer_kinds else _OFF | _ALL_DENSE
    fields.require_off({f"{arch}.{key}": neutral for key, neutral in off.items()})
    # The embedding may be padded beyond the vocabulary in the metadata; logits have its length.
    vocab_size = embedding.shape[0]
    if fields.has(f"{arch}.vocab_size"):
        fields.integer(f"{arch}.vocab_size", 1, vocab_size)
    context = fields.integer(f"{arch}.context_length")
    hidden_size = fields.integer(f"{arch}.embedding_length")
    num_heads = fields.integer(f"{arch}.attention.head_count")
    head_dim = _integer(fields, f"{arch}.attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(fields, f"{arch}.{key}", head_dim) != head_dim:
            raise fields.wrong(f"{arch}.{key}", f"{head_dim}, the size of a head")
    window = _integer(fields, f"{arch}.attention.sliding_window", 0, low=0)
    if 0 < window < context and not family.has_layer_kinds:
        raise fields.wrong(
            f"{arch}.attention.sliding_window",
            f"0 or the context ({context}): sliding windows of {arch} are not read from GGUF",
        )
    eps = fields.number(
        f"{arch}.attention.layer_norm_rms_epsilon", "a number from 0 to 1", lambda x: 0 <= x <= 1
    )
    theta = 10000.0
    if fields.has(f"{arch}.rope.freq_base"):
        theta = fields.number(f"{arch}.rope.freq_base", "a number above 1", lambda x: x > 1)
    config: dict[str, Any] = {
        "model_type": arch,
        "num_hidden_layers": fields.integer(f"{arch}.block_count"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer(f"{arch}.feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _integer(fields, f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        # Stored as float32; the decimal that was meant (1e-5, 1e-6) is its shortest representation.
        "rms_norm_eps": float(str(np.float32(eps))),
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": list(fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)),
        "eos_token_id": list(gguf_end_ids(header, vocab_size)),
    }
    scaling = _rope_scaling(header, fields, arch, head_dim, theta, context)
    if family.has_layer_kinds:
        stretched = {"rope_type": "default", **scaling, "rope_theta": theta}
        config |= _layer_kinds(fields, arch, config, window, stretched)
    else:
        config["rope_theta"] = theta
        if scaling:
            config["rope_scaling"] = scaling
    fields.ignore(key for key in header.metadata if key.partition(".")[0] not in _NAMESPACES)
    fields.ignore(f"{arch}.{key}" for key in _HARMLESS_OF_MODEL)
    fields.refuse_unread()
    return config


def gguf_end_ids(header: GgufHeader, vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text or a turn: those the metadata name, then known end-of-turn tokens that they define.

    Raises ValueError for an id that is not below `vocab_size`.
    """
    fields = Fields(header.metadata, f"{header.path}: ")
    named: list[int] = []
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        named += fields.token_ids(f"tokenizer.ggml.{key}", vocab_size)
    tokens = fields.texts("tokenizer.ggml.tokens") if fields.given("tokenizer.ggml.tokens") else []
    known = [i for i, token in enumerate(tokens[:vocab_size]) if token in END_OF_TURN]
    return tuple(dict.fromkeys((*named, *known)))


def _integer(fields: Fields, key: str, default: int, low: int = 1) -> int:
    return fields.integer(key, low) if fields.has(key) else default


def _number(fields: Fields, key: str, default: float) -> float:
    return fields.number(key, "a finite number", lambda value: True) if fields.has(key) else default


def _layer_kinds(
    fields: Fields, arch: str, described: dict[str, Any], window: int, stretched: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a family that names the kind of each layer.

    As in the graph that llama.cpp builds of it (`src/models/mellum.cpp`): positions are stretched in layers that see
    all, whatever the metadata say of the others.
    """
    num_layers, used = described["num_hidden_layers"], fields.integer(f"{arch}.expert_used_count")
    inner = _integer(fields, f"{arch}.expert_feed_forward_length", described["intermediate_size"] // used)
    gating = f"{arch}.expert_gating_func"
    if fields.has(gating) and fields.integer(gating, 0) != _SOFTMAX:
        raise fields.wrong(gating, f"{_SOFTMAX} (softmax)")
    normalises = f"{arch}.expert_weights_norm"
    theta = stretched["rope_theta"]
    if fields.has(f"{arch}.rope.freq_base_swa"):
        theta = fields.number(f"{arch}.rope.freq_base_swa", "a number above 1", lambda x: x > 1)
    is_windowed = _window_pattern(fields, f"{arch}.attention.sliding_window_pattern", num_layers)
    return {
        "num_experts": fields.integer(f"{arch}.expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": inner,
        "norm_topk_prob": fields.flag(normalises) if fields.has(normalises) else True,
        "sliding_window": window or None,
        "layer_types": [
            "sliding_attention" if window and windowed else "full_attention" for windowed in is_windowed
        ],
        "rope_parameters": {
            "full_attention": stretched,
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def _window_pattern(fields: Fields, key: str, num_layers: int) -> list[bool]:
    """Which layers have a window: a value for each, or after how many of them one has none."""
    value = fields.value(key)
    if isinstance(value, list):
        if len(value) != num_layers or not all(isinstance(windowed, bool) for windowed in value):
            raise fields.wrong(key, f"{num_layers} of true and false, or an integer")
        return value
    period = fields.integer(key, 0) if fields.has(key) else _DEFAULT_PERIOD
    return [period == 0 or i % period < period - 1 for i in range(num_layers)]


def _rope_scaling(
    header: GgufHeader, fields: Fields, arch: str, head_dim: int, theta: float, context: int
) -> dict[str, Any]:
    scaling = f"{arch}.rope.scaling."
    kind = "none"
    if fields.has(scaling + "type"):
        kind = fields.text(scaling + "type", ("none", "linear", "yarn"))
    factor = _number(fields, scaling + "factor", _number(fields, f"{arch}.rope.scale_linear", 1.0))
    attention = _number(fields, scaling + "attn_factor", 1.0)
    original = _integer(fields, scaling + "original_context_length", round(context / (factor or 1)))
    betas = {
        "beta_fast": _number(fields, scaling + "yarn_beta_fast", 32.0),
        "beta_slow": _number(fields, scaling + "yarn_beta_slow", 1.0),
    }
    is_stretched = kind != "none" and factor not in (0.0, 1.0)
    # What llama.cpp itself multiplies with. Converters write the product that config.json holds; llama.cpp computes
    # it anew whatever they write, so another one would not be what the file's own program does.
    own_factor = 0.1 * math.log(factor) + 1.0 if factor > 0 else 1.0
    written = scaling + "yarn_attn_factor"
    if fields.has(written) and not any(
        abs(_number(fields, written, 1.0) - known) < _FLOAT32_ROUNDING for known in (1.0, own_factor)
    ):
        raise fields.wrong(written, f"1 or {own_factor:.7g}")
    if ROPE_FACTORS in header.tensors:
        if is_stretched:
            raise ValueError(
                f"{header.path} has both {scaling}type and {ROPE_FACTORS}; supported: one of them"
            )
        return llama3_scaling(_read_rope_factors(header, head_dim), head_dim, theta)
    if not is_stretched:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        **betas,
        # config.json holds the product.
        "attention_factor": attention * own_factor,
    }


def _read_rope_factors(header: GgufHeader, head_dim: int) -> np.ndarray:
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise ValueError(
            f"{header.path}: {ROPE_FACTORS} must be {head_dim // 2} values of type F32, "
            f"got {list(tensor.shape)} of type {tensor.type.name}"
        )
    factors = np.empty(tensor.shape[0], np.float32)
    DataFile(tensor.path).read_into(factors.view(np.uint8).data, tensor.offset)
    return factors.astype(np.float64)


def llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """Parameters of the Llama 3 rule that reproduce the divisors `factors` [head_dim / 2] of the frequencies.

    The converter stores divisors instead of parameters. With wavelength w_i = 2 pi theta^(2i/head_dim) the
    rule is 1 / factor_i = s_i + (1 - s_i) / factor, s_i = clamp((original / w_i - low) / (high - low), 0, 1).
    Between the clamps s_i is a line in 1 / w_i; its slope original / (high - low) and intercept
    -low / (high - low) leave one of the three free, and low = 1 as in every published model fixes it.
    Raises ValueError when no parameters fit within 1e-3.
    """
    if not np.isfinite(factors).all() or factors.min() < 1 - 1e-3:
        raise ValueError(f"{ROPE_FACTORS} must not be below 1, got {factors.min():g}")
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
