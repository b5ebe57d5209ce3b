"""What a line says of a random model, `random:llama?hidden_size=64&num_layers=2&...&seed=0`: see `random_source`."""

import math
from typing import Any
from urllib.parse import parse_qsl

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.families import FAMILIES
from outrider.workers.weights.hf_config import model_config_from_hf

PREFIX = "random:"

_HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_context": "max_position_embeddings",
}
_INTEGERS = {
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 320,
    "max_context": 4096,
    "tied": 0,
    "seed": 0,
}
_FLOATS = {"rope_theta": 10000.0, "perturb": 0.0}
# Of families that name the kind of each layer. Layers have experts and a window, every `full_every`-th (0: none) sees
# all, with positions stretched by YaRN if `yarn_factor` is above 1.
_KIND_INTEGERS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 64, "window": 16, "full_every": 4}
_KIND_FLOATS = {"yarn_factor": 1.0}
_MAY_BE_ZERO = ("full_every",)
_YARN_ORIGINAL_CONTEXT = 64


def parse_spec(spec: str) -> tuple[str, dict[str, float]]:
    """`random:llama?key=value&...` -> (architecture, all options with defaults filled in)."""
    architecture, _, query = spec.removeprefix(PREFIX).partition("?")
    if architecture not in FAMILIES:
        raise ValueError(f"random:{architecture} is unknown; allowed: {', '.join(FAMILIES)}")
    options: dict[str, float] = {**_INTEGERS, **_FLOATS}
    if FAMILIES[architecture].has_layer_kinds:
        options |= {**_KIND_INTEGERS, **_KIND_FLOATS}
    optional = {"head_dim"}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in options and key not in optional:
            allowed = ", ".join(sorted({*options, *optional}))
            raise ValueError(f"random:{architecture} has no option {key}; allowed: {allowed}")
        kind = float if key in {**_FLOATS, **_KIND_FLOATS} else int
        try:
            options[key] = kind(text)
        except ValueError as error:
            raise ValueError(
                f"random:{architecture} option {key} must be a number ({kind.__name__}), got {text!r}"
            ) from error
        is_size = key in _HF_KEYS or (key in _KIND_INTEGERS and key not in _MAY_BE_ZERO)
        if not 0 <= options[key] < math.inf or (is_size and options[key] == 0):
            raise ValueError(f"random:{architecture} option {key} must be positive, got {text}")
    return architecture, options


def random_config(architecture: str, options: dict[str, float]) -> ModelConfig:
    """Of what `parse_spec` gives. Raises ValueError for sizes that do not go together."""
    heads, kv_heads = int(options["num_heads"]), int(options["num_kv_heads"])
    if heads % kv_heads:
        raise ValueError(
            f"random:{architecture} num_heads={heads} must be a multiple of num_kv_heads={kv_heads}"
        )
    if "head_dim" not in options and options["hidden_size"] % heads:
        raise ValueError(
            f"random:{architecture} hidden_size={int(options['hidden_size'])} must be a multiple of "
            f"num_heads={heads}, or head_dim given"
        )
    fields: dict[str, Any] = {_HF_KEYS[key]: int(value) for key, value in options.items() if key in _HF_KEYS}
    fields.setdefault("head_dim", int(options["hidden_size"]) // heads)
    if FAMILIES[architecture].has_layer_kinds:
        fields |= _layer_kinds(options)
    else:
        fields["rope_theta"] = float(options["rope_theta"])
    return model_config_from_hf(
        {
            "model_type": architecture,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": bool(options["tied"]),
            "bos_token_id": 1,
            "eos_token_id": [2],
            **fields,
        }
    )


def _layer_kinds(options: dict[str, float]) -> dict[str, Any]:
    every, factor = int(options["full_every"]), options["yarn_factor"]
    plain = {"rope_type": "default", "rope_theta": options["rope_theta"]}
    stretched = {
        **plain,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _YARN_ORIGINAL_CONTEXT,
    }
    return {
        "num_experts": int(options["num_experts"]),
        "num_experts_per_tok": int(options["experts_per_token"]),
        "moe_intermediate_size": int(options["expert_size"]),
        "sliding_window": int(options["window"]),
        "layer_types": [
            "full_attention" if every and (i + 1) % every == 0 else "sliding_attention"
            for i in range(int(options["num_layers"]))
        ],
        "rope_parameters": {
            "sliding_attention": plain,
            "full_attention": stretched if factor > 1 else plain,
        },
    }
