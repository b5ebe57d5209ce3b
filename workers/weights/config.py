"""What a dense Llama-like transformer is: one record for Llama, Qwen2 and Qwen3."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_KINDS = ("none", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those first trained on.

    Attributes:
        kind: "none", "linear" (positions divided by factor), "llama3" (Llama 3.1) or "yarn" (arXiv:2309.00071).
        factor: how many times longer.
        original_max_context: context length before stretching, tokens; used by llama3 and yarn.
        low_freq_factor, high_freq_factor: llama3: wavelengths above original/low are stretched, those below
            original/high are not, those between partly.
        beta_fast, beta_slow: yarn: rotations over the original context that bound the ramp.
        truncate: yarn: the ramp's bounds are rounded outwards to whole dimensions.
        attention_factor: yarn: factor on cos and sin; 1 for the other kinds.
    """

    kind: str = "none"
    factor: float = 1.0
    original_max_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer: RMS norm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
        architecture: "llama", "qwen2" (bias on q, k, v) or "qwen3" (RMS norm on each q and k head).
        num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size: sizes.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies.
        rope_scaling: stretch of the rotary frequencies.
        max_context: longest sequence, tokens.
        tied_embeddings: the output head is the embedding matrix.
        qkv_bias: q, k and v projections have a bias.
        qk_norm: RMS norm on each query and key head before rotary embedding.
        bos_token_ids, eos_token_ids: may be empty.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    bos_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()


def model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: another architecture, or a feature that this transformer does not have.
    """
    architecture = raw.get("model_type", "")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    _reject_unsupported(raw, architecture)
    num_heads = _positive(raw, "num_attention_heads")
    hidden_size = _positive(raw, "hidden_size")
    num_kv_heads = raw.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and {num_kv_heads}"
        )
    head_dim = raw.get("head_dim") or (128 if architecture == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    rope = _rope_parameters(raw)
    max_context = raw.get("max_position_embeddings") or 2048
    return ModelConfig(
        architecture=architecture,
        num_layers=_positive(raw, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(raw, "vocab_size"),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope, max_context),
        max_context=max_context,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        bos_token_ids=_token_ids(raw.get("bos_token_id")),
        eos_token_ids=_token_ids(raw.get("eos_token_id")),
    )


def to_hf_config(config: ModelConfig) -> "PreTrainedConfig":
    """The same model as a transformers configuration, for comparison with transformers' own model."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling.kind != "none":
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.original_max_context
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
            "attention_factor": scaling.attention_factor,
        }
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return classes[config.architecture](
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=config.max_context,
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=config.bos_token_ids[0] if config.bos_token_ids else None,
        eos_token_id=list(config.eos_token_ids) or None,
        pad_token_id=None,
    )


def _positive(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _reject_unsupported(raw: Mapping[str, Any], architecture: str) -> None:
    activation = raw.get("hidden_act") or "silu"
    if activation != "silu":
        raise ValueError(f"hidden_act must be silu, got {activation!r}")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"{key} must be false for {architecture}, got {raw[key]!r}")
    layer_types = raw.get("layer_types") or ()
    windowed = raw.get("use_sliding_window") and raw.get("sliding_window") is not None
    if windowed and layer_types == ():
        windowed = raw.get("max_window_layers", 28) < raw.get("num_hidden_layers", 0)
    if any(kind != "full_attention" for kind in layer_types) or (windowed and layer_types == ()):
        raise ValueError("use_sliding_window must be false: sliding-window layers are not supported")
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor must be 1, got {raw['partial_rotary_factor']!r}")


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_scaling with rope_theta beside it (transformers 4)."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta"))
    if "rope_type" not in rope:
        rope["rope_type"] = rope.get("type", "default")
    return rope


def _rope_scaling(rope: Mapping[str, Any], max_context: int) -> RopeScaling:
    kind = "none" if rope["rope_type"] == "default" else rope["rope_type"]
    if kind not in ROPE_KINDS:
        allowed = ", ".join(("default", *ROPE_KINDS[1:]))
        raise ValueError(f"rope_scaling.rope_type must be one of {allowed}, got {kind!r}")
    if kind == "none":
        return RopeScaling()
    original = int(rope.get("original_max_position_embeddings") or max_context)
    factor = float(rope.get("factor") or max_context / original)
    if factor < 1.0:
        raise ValueError(f"rope_scaling.factor must be at least 1, got {factor:g}")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=factor,
            original_max_context=original,
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_context=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """The stated factor, or YaRN's 0.1 ln(factor) + 1, or DeepSeek's quotient of two of those."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return magnitude(1.0)
