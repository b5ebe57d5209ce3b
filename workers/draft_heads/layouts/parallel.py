"""config.json of parallel drafters, in three layouts, whose tensors have the same names.

"zlab" (z-lab/dflash; hao-ai-lab/JetSpec): a qwen3 configuration with `dflash_config` in it. Slot 0 guesses nothing. A
block is bidirectional unless the file says otherwise: JetSpec's `dflash_config.causal_head`, NeMo's
`dflash_config.causal`, or `is_causal`. Ours is this one with DSpark's fields and `sample_from_anchor` in
`dflash_config`, and the fields of EAGLE-3 for a part of the vocabulary.
"deepspec" (deepseek-ai/DeepSpec, DSpark and its DFlash): those fields at the top. Slot 0 guesses, blocks are
bidirectional; the file has copies of the target's embedding and LM head.
"speculators" (vllm-project/speculators 0.9.0, `dflash`, `dspark`, `dflash2`): the layers under
`transformer_layer_config`. Layers without a window are bidirectional; in one with a window all slots see what the
anchor sees, with `sliding_window` tokens before it.

The first two name layers whose *outputs* are read: [1, 9] is our taps (2, 10), and DeepSpec's -1 is tap 0, the
embedding. speculators counts inputs, as our taps do. No layout has a default for them that would be right of other
files, nor for the mask token, so that both have to be named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from outrider.workers.draft_heads.convolutions import NO_CONVOLUTION, ConvolutionShape
from outrider.workers.draft_heads.description import KEY, HeadDescription
from outrider.workers.draft_heads.layouts.heads import (
    dtype_name,
    own_description,
    rank_fields,
    read_rank,
    unknown_fields,
)
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.pairs import NO_PAIR, PairShape
from outrider.workers.draft_heads.parallel import MAX_BLOCK, BlockLayer, ConfidenceKind, ParallelShape
from outrider.workers.weights.config import hf_rope_parameters
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.hf_config import HARMLESS_FIELDS, MAX_LAYERS, read_rope
from outrider.workers.weights.quantization_config import refuse_quantization

ParallelLayout = Literal["zlab", "deepspec", "speculators"]
SpeculatorsType = Literal["dflash", "dspark", "dflash2"]

_DFLASH = "dflash_config"
_CAUSAL = ("causal_head", "causal")
_SLIDING = "sliding_attention"
# Copies of what is the target's, which some trainers save along.
HARMLESS_TENSORS = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
_OFF: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
}
_HARMLESS = (
    "bos_token_id",
    "max_window_layers",
    "tie_word_embeddings",
    "auto_map",
    "architectures",
    "num_anchors",
    "has_no_defaults_at_init",
)


@dataclass(frozen=True)
class ParallelFile:
    """What a config.json says.

    Attributes:
        shape: of the drafter.
        layout: of the file.
        description: what it was made for, as far as it is said.
        problems: one line for each kind of thing in it that nobody reads.
    """

    shape: ParallelShape
    layout: ParallelLayout
    description: HeadDescription
    problems: list[str]


def tensor_names(names: list[str]) -> dict[str, str]:
    """The file's names by the module's."""
    selector = any(name.startswith("pair.predecessor") for name in names)
    own = "candidate_selector." if selector else "markov_head."
    return {name: own + name.removeprefix("pair.") if name.startswith("pair.") else name for name in names}


def read_parallel_config(raw: Mapping[str, Any]) -> ParallelFile:
    """Of any of the layouts. Raises ValueError for a drafter of another kind."""
    fields = Fields(raw)
    if "speculators_config" in raw or "speculators_model_type" in raw:
        return _read_speculators(fields)
    if _DFLASH in raw:
        return _read_zlab(fields)
    architectures = fields.texts("architectures") if fields.given("architectures") else []
    if architectures == ["Qwen3DSparkModel"]:
        return _read_deepspec(fields)
    raise fields.wrong(
        "architectures",
        f"['Qwen3DSparkModel'], or the file has {_DFLASH} or speculators_model_type: no other parallel drafters "
        "are known here",
    )


def _read_zlab(fields: Fields) -> ParallelFile:
    inner = Fields(fields.object(_DFLASH), f"{_DFLASH}.")
    inner.require_off({"draft_shift": (False,)})
    said = {f"{_DFLASH}.{key}": inner.flag(key) for key in _CAUSAL if inner.given(key)}
    if fields.given("is_causal"):
        said["is_causal"] = fields.flag("is_causal")
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} must be the same, got {', '.join(map(str, said.values()))}")
    is_causal = any(said.values())
    guesses = _flag(inner, "sample_from_anchor", False)
    outer = fields if fields.given("block_size") else inner
    if (
        outer is fields
        and inner.given("block_size")
        and inner.value("block_size") != fields.value("block_size")
    ):
        raise inner.wrong(
            "block_size", f"block_size ({fields.value('block_size')}), which the file has as well"
        )
    shape = _read_shape(
        sizes=fields,
        said=inner,
        block_size=outer.integer("block_size", 2, MAX_BLOCK),
        taps=tuple(layer + 1 for layer in inner.integers("target_layer_ids")),
        plain=BlockLayer(is_causal),
        windowed=lambda window: BlockLayer(is_causal, window),
        first_slot=0 if guesses else 1,
        pair=_markov(inner, 0),
        head=fields,
    )
    problems = unknown_fields(inner, f"{_DFLASH}.")
    return ParallelFile(shape, "zlab", *_described(fields, fields, shape, problems, HeadDescription()))


def _read_deepspec(fields: Fields) -> ParallelFile:
    shape = _read_shape(
        sizes=fields,
        said=fields,
        block_size=fields.integer("block_size", 2, MAX_BLOCK),
        taps=tuple(layer + 1 for layer in fields.integers("target_layer_ids")),
        plain=BlockLayer(False),
        windowed=lambda window: BlockLayer(False, window),
        first_slot=0,
        pair=_markov(fields, 0),
        head=fields,
    )
    return ParallelFile(shape, "deepspec", *_described(fields, fields, shape, [], HeadDescription()))


def _read_speculators(fields: Fields) -> ParallelFile:
    kind: Any = fields.text("speculators_model_type", ("dflash", "dspark", "dflash2"))
    layer = Fields(fields.object("transformer_layer_config"), "transformer_layer_config.")
    pair, convolution = NO_PAIR, NO_CONVOLUTION
    if kind == "dspark":
        pair = _markov(fields, 256)
    elif kind == "dflash2":
        pair = PairShape(
            "selector", _integer(fields, "selector_rank", 256), _integer(fields, "selector_top_k", 16)
        )
        group_size = _integer(fields, "conv_group_size", 16)
        convolution = ConvolutionShape(_integer(fields, "conv_kernel_size", 2), group_size)
    is_dspark = kind == "dspark"
    guesses = _flag(fields, "sample_from_anchor", is_dspark)
    windows_are_causal = not _flag(fields, "sliding_window_non_causal", kind == "dflash2")
    shape = _read_shape(
        sizes=layer,
        said=fields,
        block_size=fields.integer("block_size", 2, MAX_BLOCK),
        taps=tuple(fields.integers("aux_hidden_state_layer_ids")),
        plain=BlockLayer(False),
        windowed=lambda window: BlockLayer(windows_are_causal, window + 1, window_from_anchor=True),
        first_slot=0 if guesses else 1,
        pair=pair,
        head=fields,
        convolution=convolution,
        confidence_default=is_dspark,
    )
    if convolution.is_there and shape.hidden_size % convolution.group_size:
        raise fields.wrong("conv_group_size", f"a divisor of hidden_size ({shape.hidden_size})")
    if convolution.num_taps > shape.block_size:
        raise fields.wrong("conv_kernel_size", f"at most block_size ({shape.block_size})")
    if pair.top_k > shape.lm_head.num_ids:
        raise fields.wrong("selector_top_k", f"at most {shape.lm_head.num_ids}, the size of the vocabulary")
    target = ""
    if fields.given("speculators_config"):
        verifier = Fields(fields.object("speculators_config")).object("verifier")
        target = str(verifier.get("name_or_path") or "")
    fields.ignore(("speculators_version",))
    return ParallelFile(
        shape, "speculators", *_described(fields, layer, shape, [], HeadDescription(target_model=target))
    )


def _markov(fields: Fields, default_rank: int) -> PairShape:
    rank = fields.integer("markov_rank", 0) if fields.given("markov_rank") else default_rank
    if not fields.given("markov_head_type"):
        return PairShape("markov", rank) if rank else NO_PAIR
    kind = fields.text("markov_head_type", ("vanilla", "gated"))
    return PairShape("gated" if kind == "gated" else "markov", rank) if rank else NO_PAIR


def _read_shape(
    *,
    sizes: Fields,
    said: Fields,
    block_size: int,
    taps: tuple[int, ...],
    plain: BlockLayer,
    windowed: Callable[[int], BlockLayer],
    first_slot: int,
    pair: PairShape,
    head: Fields,
    convolution: ConvolutionShape = NO_CONVOLUTION,
    confidence_default: bool = False,
) -> ParallelShape:
    """
    Args:
        sizes: of the layers; said: where mask token and confidence head stand; head: where the LM head's sizes do.
        plain: a layer without a window; windowed: one whose `sliding_window` has so many tokens.
    """
    for part in {id(sizes): sizes, id(said): said, id(head): head}.values():
        refuse_quantization(part)
        part.require_off(_OFF)
    sizes.text("model_type", ("qwen3",))
    if sizes.has("hidden_act"):
        sizes.text("hidden_act", ("silu", "swish"))
    hidden_size, num_heads = sizes.integer("hidden_size"), sizes.integer("num_attention_heads")
    num_kv_heads = sizes.integer("num_key_value_heads", 1, num_heads)
    if num_heads % num_kv_heads:
        raise sizes.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    vocab_size = sizes.integer("vocab_size")
    max_context = sizes.integer("max_position_embeddings")
    if not any(sizes.given(key) for key in ("rope_theta", "rope_parameters", "rope_scaling")):
        raise sizes.wrong("rope_theta", "given: the target's own would be a guess")
    mask = said.integer("mask_token_id", 0, vocab_size - 1)
    for key in ("eos_token_id", "pad_token_id"):
        if mask in sizes.token_ids(key, vocab_size):
            raise said.wrong("mask_token_id", f"a token that texts do not have, not the {key}")
    if not taps or min(taps) < 0:
        raise ValueError(f"the layers of the target that are read must be named, got inputs of {list(taps)}")
    given = head.given("draft_vocab_size")
    num_ids = head.integer("draft_vocab_size", 1, vocab_size) if given else vocab_size
    given = head.given("target_hidden_size")
    return ParallelShape(
        hidden_size=hidden_size,
        target_hidden_size=head.integer("target_hidden_size") if given else hidden_size,
        vocab_size=vocab_size,
        taps=taps,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=sizes.integer("head_dim"),
        intermediate_size=sizes.integer("intermediate_size"),
        rms_norm_eps=sizes.number("rms_norm_eps", "a number from 0 to 1", lambda value: 0 <= value <= 1),
        rope=read_rope(sizes, max_context),
        max_context=max_context,
        layers=_layers(sizes, block_size, plain, windowed),
        block_size=block_size,
        first_slot=first_slot,
        num_levels=block_size - first_slot,
        mask_token_id=mask,
        lm_head=LmHeadShape(hidden_size, num_ids, read_rank(head, hidden_size)),
        pair=pair,
        confidence=_confidence(said, pair, confidence_default),
        convolution=convolution,
    )


def _layers(
    sizes: Fields, block_size: int, plain: BlockLayer, windowed: Callable[[int], BlockLayer]
) -> tuple[BlockLayer, ...]:
    num_layers = sizes.integer("num_hidden_layers", 1, MAX_LAYERS)
    kinds = sizes.texts("layer_types") if sizes.given("layer_types") else ["full_attention"] * num_layers
    if len(kinds) != num_layers or set(kinds) - {"full_attention", _SLIDING}:
        raise sizes.wrong("layer_types", f"{num_layers} of full_attention, {_SLIDING}")
    if _SLIDING not in kinds:
        sizes.ignore(("sliding_window", "use_sliding_window"))
        return (plain,) * num_layers
    window = sizes.integer("sliding_window", block_size)
    if sizes.given("use_sliding_window") and not sizes.flag("use_sliding_window"):
        raise sizes.wrong("use_sliding_window", f"true, because layer_types has {_SLIDING}")
    return tuple(windowed(window) if kind == _SLIDING else plain for kind in kinds)


def _confidence(fields: Fields, pair: PairShape, default: bool) -> ConfidenceKind:
    reads_pair = _flag(fields, "confidence_head_with_markov", default)
    if not _flag(fields, "enable_confidence_head", default):
        return "none"
    if reads_pair and not pair.is_there:
        raise fields.wrong("confidence_head_with_markov", "false without markov_rank")
    return "hidden_and_pair" if reads_pair else "hidden"


def _flag(fields: Fields, key: str, default: bool) -> bool:
    return fields.flag(key) if fields.given(key) else default


def _integer(fields: Fields, key: str, default: int) -> int:
    return fields.integer(key) if fields.given(key) else default


def _described(
    fields: Fields,
    sizes: Fields,
    shape: ParallelShape,
    problems: list[str],
    known: HeadDescription,
) -> tuple[HeadDescription, list[str]]:
    given = fields.given("num_target_layers")
    description = HeadDescription(
        target_hidden_size=shape.target_hidden_size,
        target_num_layers=fields.integer("num_target_layers") if given else 0,
        target_vocab_size=shape.vocab_size,
    )
    description = own_description(fields, description.or_else(known))
    for part in {id(fields): fields, id(sizes): sizes}.values():
        part.ignore((*HARMLESS_FIELDS, *_HARMLESS, "model_type"))
    problems = problems + unknown_fields(fields)
    if sizes is not fields:
        problems += unknown_fields(sizes, "transformer_layer_config.")
    return description, problems


def parallel_config(shape: ParallelShape, description: HeadDescription, dtype: torch.dtype) -> dict[str, Any]:
    """What `read_parallel_config` reads, in our own layout."""
    assert len(set(shape.layers)) == 1, "our layout is of layers that are alike"
    assert shape.layers[0].window == 0
    assert shape.pair.kind in ("none", "markov")
    assert not shape.convolution.is_there
    assert 0 not in shape.taps
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "block_size": shape.block_size,
        _DFLASH: {
            "causal": shape.layers[0].is_causal,
            "confidence_head_with_markov": shape.confidence == "hidden_and_pair",
            "enable_confidence_head": shape.confidence != "none",
            "markov_rank": shape.pair.rank,
            "markov_head_type": "vanilla",
            "mask_token_id": shape.mask_token_id,
            "sample_from_anchor": shape.first_slot == 0,
            "target_layer_ids": [tap - 1 for tap in shape.taps],
        },
        "draft_vocab_size": shape.lm_head.num_ids,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "layer_types": ["full_attention"] * len(shape.layers),
        "max_position_embeddings": shape.max_context,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": len(shape.layers),
        "num_key_value_heads": shape.num_kv_heads,
        "num_target_layers": description.target_num_layers or None,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": hf_rope_parameters(shape.rope),
        "target_hidden_size": shape.target_hidden_size,
        "vocab_size": shape.vocab_size,
        **rank_fields(shape.lm_head),
        **dtype_name(dtype),
        KEY: description.to_json(),
    }


def with_lm_head(
    raw: Mapping[str, Any], head: LmHeadShape, description: HeadDescription, dtype: torch.dtype
) -> dict[str, Any]:
    """A configuration of any layout that says of its drafter that it has this LM head, which is of no higher rank."""
    kept = {key: value for key, value in raw.items() if key != "dtype"}
    ours = {"draft_vocab_size": head.num_ids, **rank_fields(head), **dtype_name(dtype)}
    return {**kept, **ours, KEY: description.to_json()}
