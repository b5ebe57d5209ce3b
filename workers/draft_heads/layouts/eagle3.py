"""config.json of EAGLE-3 drafters, in two layouts.

"specforge" (SafeAILab/EAGLE, sgl-project/SpecForge, TorchSpec): a llama configuration of one layer with
`draft_vocab_size` beside it; `eagle_config.eagle_aux_hidden_state_layer_ids` are layers whose *outputs* are read, so
that [1, 15, 28] is our taps (2, 16, 29): the output of layer 1 is the input of layer 2.
"speculators" (vllm-project/speculators): the layer under `transformer_layer_config`, tensors of `layers.0.` instead
of `midlayer.`; `eagle_aux_hidden_state_layer_ids` are layers whose *inputs* are read, as vLLM captures them and as
our taps count: [2, 16, 29] for the same drafter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from outrider.workers.draft_heads.description import KEY, HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Shape, default_taps
from outrider.workers.draft_heads.layouts.heads import (
    dtype_name,
    own_description,
    rank_fields,
    read_rank,
    unknown_fields,
)
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.weights.config import Rope
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.hf_config import HARMLESS_FIELDS, read_rope
from outrider.workers.weights.quantization_config import refuse_quantization

Eagle3Layout = Literal["specforge", "speculators"]

# The target's own, which some trainers save along.
HARMLESS_TENSORS = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
_PREFIXES: Mapping[Eagle3Layout, str] = {"specforge": "midlayer.", "speculators": "layers.0."}
_IDS = "eagle_aux_hidden_state_layer_ids"

# Without effect on a drafter of these layouts: their code has no windows, and reads no bias of fc.
_HARMLESS = (
    "bos_token_id",
    "eos_token_id",
    "max_window_layers",
    "sliding_window",
    "target_model_type",
    "bias",
)
_OFF: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "tie_word_embeddings": (False,),
    "partial_rotary_factor": (1,),
    "use_qk_norm": (False,),
    "logit_scale": (1,),
    "norm_before_fc": (False,),
    "fc_norm": (False,),
    "parallel_drafting": (False,),
    "embed_requires_grad": (False,),
}
_EAGLE_OFF: Mapping[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
}


@dataclass(frozen=True)
class Eagle3File:
    """What a config.json says.

    Attributes:
        shape: of the drafter.
        description: what it was made for, as far as it is said.
        problems: one line for each kind of thing in it that nobody reads.
    """

    shape: Eagle3Shape
    description: HeadDescription
    problems: list[str]


def tensor_names(names: list[str], stored: list[str], layout: Eagle3Layout) -> dict[str, str]:
    """The file's names by the module's. vLLM reads both prefixes, and so both are written in either layout."""
    other = next((prefix for prefix in _PREFIXES.values() if any(x.startswith(prefix) for x in stored)), "")
    return {name: name.replace("midlayer.", other or _PREFIXES[layout]) for name in names}


def read_eagle3_config(raw: Mapping[str, Any], target_num_layers: int | None) -> Eagle3File:
    """Both layouts. Raises ValueError for a drafter of another kind.

    `target_num_layers`: to find the taps of a file that does not name them; None if it is not known.
    """
    if "speculators_config" in raw or "speculators_model_type" in raw:
        return _read_speculators(Fields(raw), target_num_layers)
    return _read_specforge(Fields(raw), target_num_layers)


def _read_specforge(fields: Fields, target_num_layers: int | None) -> Eagle3File:
    if fields.given("architectures"):
        names = fields.texts("architectures")
        if names not in (["LlamaForCausalLMEagle3"], ["LlamaForCausalLM"]):
            raise fields.wrong("architectures", "['LlamaForCausalLMEagle3'] or ['LlamaForCausalLM']")
    # Off here means that the head reads rows without the norm, on that the norm is also fed back, by who serves it.
    fields.require_off({"norm_output": ()})
    ids: list[int] = []
    problems: list[str] = []
    if fields.given("eagle_config"):
        eagle = Fields(fields.object("eagle_config"), "eagle_config.")
        eagle.require_off(_EAGLE_OFF)
        ids = [layer + 1 for layer in eagle.integers(_IDS)] if eagle.given(_IDS) else []
        problems += unknown_fields(eagle, "eagle_config.")
    taps = _taps(ids, f"eagle_config.{_IDS}", target_num_layers)
    normed = fields.flag("norm_before_residual") if fields.has("norm_before_residual") else False
    num_ids = fields.integer("draft_vocab_size") if fields.given("draft_vocab_size") else 0
    shape = _read_layer(fields, fields, taps, normed, num_ids)
    fields.ignore(HARMLESS_FIELDS)
    return Eagle3File(
        shape, _description(fields, shape, target_num_layers), problems + unknown_fields(fields)
    )


def _read_speculators(fields: Fields, target_num_layers: int | None) -> Eagle3File:
    fields.text("speculators_model_type", ("eagle3",))
    if fields.given("architectures"):
        names = fields.texts("architectures")
        if names not in (["Eagle3Speculator"], ["Eagle3DraftModel"]):
            raise fields.wrong("architectures", "['Eagle3Speculator'] or ['Eagle3DraftModel']")
    fields.require_off({"norm_output": (False,)})
    ids = fields.integers(_IDS) if fields.given(_IDS) else []
    taps = _taps(ids, _IDS, target_num_layers)
    layer = Fields(fields.object("transformer_layer_config"), "transformer_layer_config.")
    # vLLM and speculators have different defaults: a file that does not say could be either.
    normed = fields.flag("norm_before_residual")
    shape = _read_layer(fields, layer, taps, normed, fields.integer("draft_vocab_size"))
    target = ""
    if fields.given("speculators_config"):
        verifier = Fields(fields.object("speculators_config")).object("verifier")
        target = str(verifier.get("name_or_path") or "")
    fields.ignore(
        (*HARMLESS_FIELDS, "speculators_version", "auto_map", "has_no_defaults_at_init", "model_type")
    )
    layer.ignore((*HARMLESS_FIELDS, "architectures"))
    described = _description(fields, shape, target_num_layers).or_else(HeadDescription(target_model=target))
    problems = unknown_fields(fields) + unknown_fields(layer, "transformer_layer_config.")
    return Eagle3File(shape, described, problems)


def _read_layer(
    fields: Fields, layer: Fields, taps: tuple[int, ...], norm_before_residual: bool, num_ids: int
) -> Eagle3Shape:
    """`layer`: of the decoder layer, which for some are all fields; `num_ids` 0: the whole vocabulary."""
    for part in {id(fields): fields, id(layer): layer}.values():
        refuse_quantization(part)
        part.require_off(_OFF)
        part.ignore(_HARMLESS)
    layer.text("model_type", ("llama",))
    if layer.integer("num_hidden_layers") != 1:
        raise layer.wrong("num_hidden_layers", "1 (drafters of several layers are not supported)")
    if layer.has("hidden_act"):
        layer.text("hidden_act", ("silu", "swish"))
    if layer.given("layer_types") and set(layer.texts("layer_types")) != {"full_attention"}:
        raise layer.wrong("layer_types", "['full_attention']")
    hidden_size = layer.integer("hidden_size")
    num_heads = layer.integer("num_attention_heads")
    given = layer.given("num_key_value_heads")
    num_kv_heads = layer.integer("num_key_value_heads", 1, num_heads) if given else num_heads
    if num_heads % num_kv_heads:
        raise layer.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if not layer.given("head_dim") and hidden_size % num_heads:
        raise layer.wrong("head_dim", f"given, because {num_heads} heads do not divide {hidden_size}")
    head_dim = layer.integer("head_dim") if layer.given("head_dim") else hidden_size // num_heads
    vocab_size = layer.integer("vocab_size")
    max_context = layer.integer("max_position_embeddings") if layer.given("max_position_embeddings") else 2048
    eps = layer.number("rms_norm_eps", "a number from 0 to 1", lambda value: 0 <= value <= 1)
    given = fields.given("target_hidden_size")
    shape = Eagle3Shape(
        hidden_size=hidden_size,
        target_hidden_size=fields.integer("target_hidden_size") if given else hidden_size,
        vocab_size=vocab_size,
        taps=taps,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=layer.integer("intermediate_size"),
        rms_norm_eps=eps,
        rope=read_rope(layer, max_context),
        max_context=max_context,
        norm_before_residual=norm_before_residual,
        lm_head=LmHeadShape(hidden_size, num_ids or vocab_size, read_rank(fields, hidden_size)),
    )
    if shape.lm_head.num_ids > vocab_size:
        raise fields.wrong("draft_vocab_size", f"at most vocab_size ({vocab_size})")
    given = fields.given("num_aux_hidden_states")
    if given and fields.integer("num_aux_hidden_states") != len(taps):
        raise fields.wrong("num_aux_hidden_states", f"{len(taps)}, as many as {_IDS}")
    return shape


def _taps(ids: list[int], field: str, target_num_layers: int | None) -> tuple[int, ...]:
    if not ids:
        if target_num_layers is None:
            raise ValueError(f"{field} is missing, and without it the target's number of layers is needed")
        return default_taps(target_num_layers)
    last = max(ids) if target_num_layers is None else target_num_layers
    if not all(0 <= layer <= last for layer in ids):
        raise ValueError(f"{field} must name layers of the target, which has {last}, got inputs of {ids}")
    return tuple(ids)


def _description(fields: Fields, shape: Eagle3Shape, target_num_layers: int | None) -> HeadDescription:
    known = HeadDescription(
        target_hidden_size=shape.target_hidden_size,
        target_num_layers=target_num_layers or 0,
        target_vocab_size=shape.vocab_size,
    )
    return own_description(fields, known)


def eagle3_config(
    shape: Eagle3Shape, description: HeadDescription, layout: Eagle3Layout, dtype: torch.dtype
) -> dict[str, Any]:
    """What `read_eagle3_config` reads. ValueError for sizes that the layout cannot say."""
    layer = {
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_context,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        **_rope_fields(shape.rope),
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
    }
    shared = {
        "draft_vocab_size": shape.lm_head.num_ids,
        "norm_before_residual": shape.norm_before_residual,
        "target_hidden_size": shape.target_hidden_size,
        **rank_fields(shape.lm_head),
        **dtype_name(dtype),
        KEY: description.to_json(),
    }
    if layout == "specforge":
        if 0 in shape.taps:
            raise ValueError(
                "the layout specforge cannot name the target's embedding (tap 0): use speculators"
            )
        outputs = {_IDS: [tap - 1 for tap in shape.taps]}
        return {"architectures": ["LlamaForCausalLMEagle3"], **layer, "eagle_config": outputs, **shared}
    if shape.target_hidden_size != shape.hidden_size:
        raise ValueError(
            "the layout speculators needs a drafter as wide as its target, got "
            f"{shape.hidden_size} and {shape.target_hidden_size}: use specforge"
        )
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": description.target_model or None, "architectures": []},
        },
        _IDS: list(shape.taps),
        "transformer_layer_config": layer,
        **shared,
    }


def _rope_fields(rope: Rope) -> dict[str, Any]:
    scaling = {"rope_type": rope.kind, **rope.parameters} if rope.kind != "default" else None
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
