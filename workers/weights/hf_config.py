"""config.json of Hugging Face, as transformers 4 and 5 write it, to ModelConfig.

Every field is read, or known to change nothing that is computed, or refused by name.
"""

from collections.abc import Mapping
from typing import Any

from outrider.workers.weights.config import (
    ROPE_KINDS,
    DenseMlp,
    LayerConfig,
    ModelConfig,
    Rope,
    RoutedMlp,
)
from outrider.workers.weights.families import Family, family_named
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.quantization_config import read_quantization

MAX_LAYERS = 10000  # of a file that is not damaged

# Bookkeeping, training, outputs of other kinds, and sampling defaults: a deployment has its own.
_HARMLESS = """
transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash model_name
initializer_range attention_dropout hidden_dropout dropout embd_pdrop resid_pdrop attn_pdrop classifier_dropout
gradient_checkpointing router_aux_loss_coef
use_cache output_hidden_states output_attentions output_scores return_dict return_dict_in_generate
chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss is_decoder tie_last_hidden_states
attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
_flash_attn_2_enabled use_flash_attn experts_implementation keys_to_ignore_at_inference
id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
tokenizer_class pad_token_id sep_token_id decoder_start_token_id eos_token bos_token pad_token
max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups num_return_sequences
diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
max_sequence_length model_max_length seq_length pretraining_tp num_logits_to_keep logits_to_keep
unsloth_fixed unsloth_version is_llama_config transformers.js_config
"""
HARMLESS_FIELDS = tuple(_HARMLESS.split())

# What another model would do with them is not done here; null is neutral for all.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "dual_chunk_attention_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "use_qk_norm": (False,),
    "auto_map": ({},),
}
# Of families all of whose layers are dense and are the model's own.
_ALL_DENSE: Mapping[str, tuple[Any, ...]] = {
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
}

_OF_MLPS = (
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
)

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Of a family that names the kind of each layer: said twice, about training, or about a head for multi-token
# prediction, whose tensors the target does not read.
_HARMLESS_WITH_KINDS = (
    "use_sliding_window",
    "max_window_layers",
    "output_router_logits",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_layer_types",
    "mtp_mlp_layer_types",
)

# Of each kind of rotary scaling: the parameters that must be there, and those that may.
_ROPE_PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_NEED_ORIGINAL_CONTEXT = ("llama3", "yarn")


def model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads the fields of a `config.json`.

    Raises:
        ValueError: another family, a value that is no such value, or a field that asks for what is not there.
    """
    family = family_named(raw.get("model_type"), "model_type")
    fields = Fields({**family.defaults, **raw})
    fields.ignore(("model_type",))
    quantization = read_quantization(fields)
    if fields.given("architectures") and fields.texts("architectures") != [family.causal_lm]:
        raise fields.wrong("architectures", f"['{family.causal_lm}']")
    if fields.has("hidden_act"):
        fields.text("hidden_act", ("silu", "swish"))
    fields.require_off({**_OFF, **({} if family.has_layer_kinds else _ALL_DENSE), **family.off})
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    vocab_size = fields.integer("vocab_size")
    max_context = fields.integer("max_position_embeddings")
    num_kv_heads = fields.integer("num_key_value_heads") if fields.given("num_key_value_heads") else num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and {num_kv_heads}"
        )
    if not fields.given("head_dim") and hidden_size % num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads, or head_dim given, got {hidden_size} "
            f"and {num_heads}"
        )
    head_dim = fields.integer("head_dim") if fields.given("head_dim") else hidden_size // num_heads
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    eps = 1e-6
    if fields.has("rms_norm_eps"):
        eps = fields.number("rms_norm_eps", "a number from 0 to 1", lambda value: 0 <= value <= 1)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    if family.has_layer_kinds:
        layers = _layers_by_kind(fields, num_layers, max_context)
    else:
        rope = read_rope(fields, max_context)
        mlp = DenseMlp(fields.integer("intermediate_size"))
        layers = [LayerConfig(window, rope, mlp) for window in _windows(fields, family, num_layers)]
    tied = fields.flag("tie_word_embeddings") if fields.has("tie_word_embeddings") else False
    config = ModelConfig(
        architecture=family.name,
        layers=tuple(layers),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=eps,
        max_context=max_context,
        tied_embeddings=tied,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        bos_token_ids=fields.token_ids("bos_token_id", vocab_size),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        quantization=quantization,
    )
    fields.ignore(HARMLESS_FIELDS)
    fields.refuse_unread()
    return config


def read_rope(fields: Fields, max_context: int) -> Rope:
    """From rope_parameters (transformers 5), or rope_scaling with rope_theta beside it (transformers 4)."""
    keys = [key for key in ("rope_scaling", "rope_parameters") if fields.given(key)]
    if len(keys) == 2 and fields.object(keys[0]) != fields.object(keys[1]):
        raise ValueError("rope_scaling and rope_parameters must be the same where both are given")
    key = keys[0] if keys else "rope_parameters"
    raw = dict(fields.object(key)) if keys else {}
    outer = {}
    if fields.has("rope_theta"):
        # transformers lets the inner one win.
        theta = fields.number("rope_theta", "a number above 1", lambda value: value > 1)
        outer["rope_theta"] = theta
    if fields.given("original_max_position_embeddings"):
        # transformers lets the outer one win.
        raw["original_max_position_embeddings"] = fields.integer("original_max_position_embeddings")
    return rope_from_hf({**outer, **raw}, f"{key}.", max_context)


def rope_from_hf(raw: Mapping[str, Any], prefix: str, max_context: int) -> Rope:
    """One dictionary of rotary parameters; `prefix` stands before its keys in messages.

    Raises ValueError for a kind that cannot be computed ahead of time (dynamic, longrope) or is not known.
    """
    fields = Fields(raw, prefix)
    kind = "default"
    for key in ("type", "rope_type"):
        if fields.has(key):
            kind = fields.text(key, ROPE_KINDS)
    fields.require_off({"partial_rotary_factor": (1,)})
    theta = 10000.0
    if fields.has("rope_theta"):
        theta = fields.number("rope_theta", "a number above 1", lambda value: value > 1)
    required, optional = _ROPE_PARAMETERS[kind]
    parameters: dict[str, float] = {}
    if kind in _NEED_ORIGINAL_CONTEXT:
        key = "original_max_position_embeddings"
        parameters[key] = fields.integer(key) if fields.given(key) else max_context
    else:
        fields.ignore(("original_max_position_embeddings",))
    for key in (*required, *(key for key in optional if fields.given(key))):
        if key == "truncate":
            parameters[key] = fields.flag(key)
        elif key == "factor" and kind == "yarn" and fields.has(key) and not fields.given(key):
            parameters[key] = max_context / parameters["original_max_position_embeddings"]
        elif key == "factor":
            parameters[key] = fields.number(key, "a number of at least 1", lambda value: value >= 1)
        else:
            parameters[key] = fields.number(key, "a number above 0", lambda value: value > 0)
    _require_order(prefix, parameters, "low_freq_factor", "high_freq_factor")
    _require_order(prefix, {"beta_slow": 1, "beta_fast": 32, **parameters}, "beta_slow", "beta_fast")
    fields.refuse_unread()
    return Rope(theta, kind, parameters)


def _require_order(prefix: str, parameters: Mapping[str, float], low: str, high: str) -> None:
    if low in parameters and not parameters[low] < parameters[high]:
        raise ValueError(
            f"{prefix}{high} must be above {prefix}{low}, got {parameters[high]:g} and {parameters[low]:g}"
        )


def _windows(fields: Fields, family: Family, num_layers: int) -> list[int]:
    """The window of each layer, 0 for full attention; which layers have one is said by layer_types or a count."""
    in_use = fields.flag("use_sliding_window") if fields.has("use_sliding_window") else False
    if in_use and not family.has_windows:
        raise fields.wrong("use_sliding_window", f"false for {family.name}")
    window = fields.integer("sliding_window") if fields.given("sliding_window") else 0
    first = fields.integer("max_window_layers", 0) if fields.given("max_window_layers") else num_layers
    window = window if in_use else 0
    if not fields.given("layer_types"):
        return [window if index >= first else 0 for index in range(num_layers)]
    kinds = fields.texts("layer_types")
    allowed = (_FULL, _SLIDING) if window else (_FULL,)
    if len(kinds) != num_layers or not set(kinds) <= set(allowed):
        hint = "" if window else " (without use_sliding_window there are no sliding ones)"
        raise fields.wrong("layer_types", f"{num_layers} of {', '.join(allowed)}{hint}")
    return [window if kind == _SLIDING else 0 for kind in kinds]


def _layers_by_kind(fields: Fields, num_layers: int, max_context: int) -> list[LayerConfig]:
    """Of a family that names the kind of each layer, see `Family.has_layer_kinds`."""
    attention = _kinds(fields, "layer_types", num_layers, (_FULL, _SLIDING), otherwise=_FULL)
    mlps = _kinds(fields, "mlp_layer_types", num_layers, ("sparse", "dense"), otherwise="sparse")
    by_kind: dict[str, DenseMlp | RoutedMlp] = {}
    if "dense" in mlps:
        by_kind["dense"] = DenseMlp(fields.integer("intermediate_size"))
    if "sparse" in mlps:
        by_kind["sparse"] = _experts(fields)
    fields.ignore(_OF_MLPS)
    windows = {kind: fields.integer("sliding_window") if kind == _SLIDING else 0 for kind in set(attention)}
    fields.ignore(("sliding_window", *_HARMLESS_WITH_KINDS))
    positions = Fields(fields.object("rope_parameters"), "rope_parameters.")
    ropes = {
        kind: rope_from_hf(positions.object(kind), f"rope_parameters.{kind}.", max_context)
        for kind in windows
    }
    positions.ignore((_FULL, _SLIDING))
    positions.refuse_unread()
    return [
        LayerConfig(windows[kind], ropes[kind], by_kind[mlp])
        for kind, mlp in zip(attention, mlps, strict=True)
    ]


def _kinds(fields: Fields, key: str, num_layers: int, allowed: tuple[str, ...], otherwise: str) -> list[str]:
    """What a list says of each layer; `otherwise` for all where there is no list."""
    if not fields.given(key):
        return [otherwise] * num_layers
    kinds = fields.texts(key)
    if len(kinds) != num_layers or not set(kinds) <= set(allowed):
        raise fields.wrong(key, f"{num_layers} of {', '.join(allowed)}")
    return kinds


def _experts(fields: Fields) -> RoutedMlp:
    keys = [key for key in ("num_experts", "num_local_experts") if fields.given(key)]
    num_experts = fields.integer(keys[0] if keys else "num_experts")
    if any(fields.integer(key) != num_experts for key in keys):
        raise ValueError("num_experts and num_local_experts must be the same where both are given")
    return RoutedMlp(
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 1, num_experts),
        intermediate_size=fields.integer("moe_intermediate_size"),
        renormalised=fields.flag("norm_topk_prob"),
    )
