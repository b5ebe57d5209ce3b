"""The families of models that can be run: what each has of its own. A new one is an entry of FAMILIES."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family, named as `model_type` in config.json and `general.architecture` in GGUF.

    Attributes:
        name: see above.
        causal_lm: the class that config.json may name in `architectures`.
        qkv_bias, qk_norm: see `ModelConfig`.
        has_windows: some of its layers may see a sliding window only.
        has_layer_kinds: config.json names the kind of each layer: `layer_types` says which have a window (whatever
            `use_sliding_window` says), `mlp_layer_types` which have experts, and `rope_parameters` has an entry for
            each kind of attention.
        gguf_permutes: llama.cpp's converter reorders the rows of q and k inside each head.
        defaults: what transformers takes for fields that config.json does not have.
        off: fields of config.json that must not ask for anything: their neutral values.
    """

    name: str
    causal_lm: str
    qkv_bias: bool
    qk_norm: bool
    has_windows: bool
    gguf_permutes: bool
    has_layer_kinds: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_MELLUM_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "moe_intermediate_size": 896,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            causal_lm="LlamaForCausalLM",
            qkv_bias=False,
            qk_norm=False,
            has_windows=False,
            gguf_permutes=True,
            defaults={"max_position_embeddings": 2048},
            off={"attention_bias": (False,), "mlp_bias": (False,), "sliding_window": ()},
        ),
        Family(
            name="qwen2",
            causal_lm="Qwen2ForCausalLM",
            qkv_bias=True,
            qk_norm=False,
            has_windows=True,
            gguf_permutes=False,
            defaults=_QWEN_DEFAULTS,
            # transformers' Qwen2 has its biases whatever `attention_bias` says; the tensors are compared.
            off={"mlp_bias": (False,), "attention_bias": (False, True)},
        ),
        Family(
            name="qwen3",
            causal_lm="Qwen3ForCausalLM",
            qkv_bias=False,
            qk_norm=True,
            has_windows=True,
            gguf_permutes=False,
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
            off={"attention_bias": (False,), "mlp_bias": (False,)},
        ),
        Family(
            name="mellum",
            causal_lm="MellumForCausalLM",
            qkv_bias=False,
            qk_norm=True,
            has_windows=True,
            gguf_permutes=False,
            has_layer_kinds=True,
            defaults=_MELLUM_DEFAULTS,
            off={"attention_bias": (False,)},
        ),
    )
}


def family_named(name: object, key: str) -> Family:
    """The family; raises ValueError that names `key`, the field in which `name` stands, and the known ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{key} must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]
