"""config.json and tensor names of heads for multi-token prediction, in three layouts.

"deepseek" (DeepSeek-V3): the configuration of the target, whose layer behind the last one the head is:
`model.layers.{L}.{enorm,hnorm,eh_proj,shared_head.norm}` beside the names of any layer.
"mtp" (Mellum 2, Qwen3-Next, as transformers' `MtpModel` reads them): the same configuration, `mtp.layers.0.` and, one
level up, `mtp.{pre_fc_norm_embedding,pre_fc_norm_hidden,fc,norm}`.
"speculators" (vllm-project/speculators): the target's configuration under `transformer_layer_config`, and
`mtp_layers.0.` with `{token,hidden,final}_layernorm` and `input_proj`.
None of them has an LM head of its own, which is the target's; where ours has one it stands beside the norm in front
of it, with the tables of EAGLE-3 for a part of the vocabulary and TorchSpec's names for low rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from outrider.workers.draft_heads.description import KEY, HeadDescription
from outrider.workers.draft_heads.layouts.heads import (
    dtype_name,
    own_description,
    rank_fields,
    read_rank,
    unknown_fields,
)
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.mtp import MtpShape, default_layer
from outrider.workers.weights.config import ModelConfig, RoutedMlp, to_hf_config
from outrider.workers.weights.families import FAMILIES
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.hf_config import HARMLESS_FIELDS, model_config_from_hf

MtpLayout = Literal["deepseek", "mtp", "speculators"]

_LAYERS = "num_nextn_predict_layers"
_KINDS = ("mtp_layer_types", "mtp_mlp_layer_types")
_OURS = (_LAYERS, "num_mtp_layers", *_KINDS, "draft_vocab_size", "lm_head_rank", "lm_head_rank_divisor", KEY)
# Of each layout: what the names begin with, and those that are no layer's own; {L}: the target's number of layers.
_PREFIXES: Mapping[MtpLayout, str] = {
    "deepseek": "model.layers.{L}.",
    "mtp": "mtp.layers.0.",
    "speculators": "mtp_layers.0.",
}
_NAMES: Mapping[MtpLayout, Mapping[str, str]] = {
    "deepseek": {
        "enorm.": "model.layers.{L}.enorm.",
        "hnorm.": "model.layers.{L}.hnorm.",
        "eh_proj.": "model.layers.{L}.eh_proj.",
        "norm.": "model.layers.{L}.shared_head.norm.",
        "lm_head.": "model.layers.{L}.shared_head.head.",
    },
    "mtp": {
        "enorm.": "mtp.pre_fc_norm_embedding.",
        "hnorm.": "mtp.pre_fc_norm_hidden.",
        "eh_proj.": "mtp.fc.",
        "norm.": "mtp.norm.",
        "lm_head.": "mtp.lm_head.",
    },
    "speculators": {
        "enorm.": "mtp_layers.0.token_layernorm.",
        "hnorm.": "mtp_layers.0.hidden_layernorm.",
        "eh_proj.": "mtp_layers.0.input_proj.",
        "norm.": "mtp_layers.0.final_layernorm.",
        "lm_head.": "lm_head.",
    },
}
# Copies of what is the target's.
_COPIES = ("model.layers.{L}.embed_tokens.weight", "embed_tokens.weight", "verifier_lm_head.weight")


@dataclass(frozen=True)
class MtpFile:
    """What a config.json says.

    Attributes:
        shape: of the head.
        description: what it was made for, as far as it is said.
        is_speculators: the layout; of the others the names of the tensors tell which it is.
        problems: one line for each kind of thing in it that nobody reads.
    """

    shape: MtpShape
    description: HeadDescription
    is_speculators: bool
    problems: list[str]


def layout_of(file: MtpFile, stored: Collection[str]) -> MtpLayout:
    """How these tensors are laid out."""
    if file.is_speculators:
        return "speculators"
    return "mtp" if any(name.startswith("mtp.") for name in stored) else "deepseek"


def mtp_names(names: Collection[str], num_layers: int, layout: MtpLayout) -> dict[str, str]:
    """The file's names by the module's; num_layers: the target's."""
    return {name: _file_name(name, layout).replace("{L}", str(num_layers)) for name in names}


def copies_of_the_target(num_layers: int) -> set[str]:
    """Names that may be there although nobody reads them."""
    return {name.replace("{L}", str(num_layers)) for name in _COPIES}


def _file_name(name: str, layout: MtpLayout) -> str:
    if name.startswith("block."):
        return _PREFIXES[layout] + name.removeprefix("block.")
    ours, theirs = next(pair for pair in _NAMES[layout].items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def read_mtp_config(raw: Mapping[str, Any]) -> MtpFile:
    """All layouts. Raises ValueError for a head of another kind, or of a target that is not supported."""
    fields = Fields({key: value for key, value in raw.items() if key in _OURS or "speculators" in key})
    is_speculators = "speculators_config" in raw or "speculators_model_type" in raw
    target_name, problems = "", []
    if is_speculators:
        outer = Fields(raw)
        outer.text("speculators_model_type", ("mtp",))
        if outer.given("architectures") and outer.texts("architectures") != ["MTPDraftModel"]:
            raise outer.wrong("architectures", "['MTPDraftModel']")
        described = dict(outer.object("transformer_layer_config"))
        if outer.given("speculators_config"):
            verifier = Fields(outer.object("speculators_config")).object("verifier")
            target_name = str(verifier.get("name_or_path") or "")
        outer.ignore(
            (*HARMLESS_FIELDS, *_OURS, "speculators_version", "has_no_defaults_at_init", "model_type")
        )
        problems = unknown_fields(outer)
    else:
        described = dict(raw)
    kinds = Fields(described, "transformer_layer_config." if is_speculators else "")
    _require_one_layer(fields)
    target = model_config_from_hf({key: value for key, value in described.items() if key not in _OURS})
    given = fields.given("draft_vocab_size")
    num_ids = fields.integer("draft_vocab_size", 1, target.vocab_size) if given else target.vocab_size
    rank = read_rank(fields, target.hidden_size)
    shape = MtpShape(target, _like(kinds, target), LmHeadShape(target.hidden_size, num_ids, rank))
    known = HeadDescription(
        target_model=target_name,
        target_hidden_size=target.hidden_size,
        target_num_layers=target.num_layers,
        target_vocab_size=target.vocab_size,
    )
    return MtpFile(shape, own_description(fields, known), is_speculators, problems)


def _require_one_layer(fields: Fields) -> None:
    for key in (_LAYERS, "num_mtp_layers"):
        if fields.given(key) and fields.integer(key) != 1:
            raise fields.wrong(key, "1 (heads of several layers are not supported)")


def _like(fields: Fields, target: ModelConfig) -> int:
    """The target's layer that the head's block is like."""
    if not FAMILIES[target.architecture].has_layer_kinds or not fields.given(_KINDS[0]):
        return default_layer(target)
    (attention,) = _one(fields, _KINDS[0], ("full_attention", "sliding_attention"))
    (mlp,) = _one(fields, _KINDS[1], ("sparse", "dense")) if fields.given(_KINDS[1]) else ("sparse",)
    found = [i for i in range(target.num_layers) if _kinds_of(target, i) == (attention, mlp)]
    if not found:
        raise fields.wrong(_KINDS[0], f"that of a layer of the target with {_KINDS[1]} {mlp}")
    return found[-1]


def _one(fields: Fields, key: str, allowed: tuple[str, ...]) -> list[str]:
    kinds = fields.texts(key)
    if len(kinds) != 1 or kinds[0] not in allowed:
        raise fields.wrong(key, f"one of {', '.join(allowed)}, in a list")
    return kinds


def _kinds_of(target: ModelConfig, layer: int) -> tuple[str, str]:
    described = target.layers[layer]
    return (
        "sliding_attention" if described.window else "full_attention",
        "sparse" if isinstance(described.mlp, RoutedMlp) else "dense",
    )


def mtp_config(
    shape: MtpShape, description: HeadDescription, layout: MtpLayout, dtype: torch.dtype
) -> dict[str, Any]:
    """What `read_mtp_config` reads."""
    target = to_hf_config(shape.target).to_dict()
    if FAMILIES[shape.target.architecture].has_layer_kinds:
        target |= dict(zip(_KINDS, ([kind] for kind in _kinds_of(shape.target, shape.like)), strict=True))
    ours = {
        _LAYERS: 1,
        "draft_vocab_size": shape.lm_head.num_ids,
        **rank_fields(shape.lm_head),
        **dtype_name(dtype),
        KEY: description.to_json(),
    }
    if layout != "speculators":
        return target | {"architectures": [FAMILIES[shape.target.architecture].causal_lm]} | ours
    return {
        "architectures": ["MTPDraftModel"],
        "speculators_model_type": "mtp",
        "speculators_config": {
            "algorithm": "mtp",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {
                "name_or_path": description.target_model or None,
                "architectures": [FAMILIES[shape.target.architecture].causal_lm],
            },
        },
        "transformer_layer_config": target,
        **ours,
    }
