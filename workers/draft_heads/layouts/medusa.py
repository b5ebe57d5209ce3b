"""config.json and tensor names of Medusa heads, in two layouts.

"fasterdecoding" (FasterDecoding/Medusa): head k is `{k}.{j}.linear.weight|bias` for its blocks j and
`{k}.{num_layers}.weight` for its LM head; in a Medusa-2 checkpoint the same under `medusa_head.`, beside the target
that was trained along. The configurations say neither sizes nor, always, the number of heads (published ones say 2
where there are 5), so these are read off the tensors.
"vllm" (vllm-project/vllm): `medusa_heads.blocks.{k}.layers.{j}.weight|bias`, `medusa_heads.lm_heads.{k}.weight`;
`token_map` [V'], the ids of the rows of all LM heads (`truncated_vocab_size`); with `original_lm_head` all heads end
in `medusa_heads.lm_heads.0.weight`. Low rank, which nobody else has: `.down.weight` and `.up.weight` as TorchSpec's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from outrider.workers.draft_heads.description import KEY, HeadDescription
from outrider.workers.draft_heads.layouts.heads import (
    dtype_name,
    own_description,
    rank_fields,
    read_rank,
    unknown_fields,
)
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaShape
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.hf_config import HARMLESS_FIELDS
from outrider.workers.weights.quantization_config import refuse_quantization

MedusaLayout = Literal["fasterdecoding", "vllm"]

TOKEN_MAP = "token_map"
MEDUSA_2 = "medusa_head."
_VLLM = "medusa_heads."
_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.linear\.(weight|bias)")
_HEAD = re.compile(r"lm_heads\.(\d+)\.(.+)")
# Of vLLM's own bookkeeping, of the trees of either program, and of the target in a Medusa-2 checkpoint.
_HARMLESS = """
bos_token_id eos_token_id max_paths topk max_seq_len num_lookahead_tokens medusa_choices medusa_num_choices
model_type architectures hidden_act intermediate_size max_position_embeddings num_attention_heads
num_key_value_heads rms_norm_eps rope_theta rope_scaling rope_parameters head_dim attention_bias mlp_bias
sliding_window tie_word_embeddings
"""


@dataclass(frozen=True)
class MedusaFile:
    """What a checkpoint says of its heads.

    Attributes:
        shape: of the heads.
        description: what they were made for, as far as it is said.
        layout: how they are laid out.
        prefix: before the names of all of their tensors.
        has_bias: blocks have one; without, ours are zero.
        problems: one line for each kind of thing in it that nobody reads.
    """

    shape: MedusaShape
    description: HeadDescription
    layout: MedusaLayout
    prefix: str
    has_bias: bool
    problems: list[str]


def medusa_names(names: list[str], num_layers: int, layout: MedusaLayout, prefix: str) -> dict[str, str]:
    """The file's names by the module's."""
    return {name: prefix + _file_name(name, num_layers, layout) for name in names}


def _file_name(name: str, num_layers: int, layout: MedusaLayout) -> str:
    if block := _BLOCK.fullmatch(name):
        head, layer, kind = block.groups()
        return (
            f"{head}.{layer}.linear.{kind}"
            if layout == "fasterdecoding"
            else f"blocks.{head}.layers.{layer}.{kind}"
        )
    found = _HEAD.fullmatch(name)
    assert found, name
    head, rest = found.groups()
    return f"{head}.{num_layers}.{rest}" if layout == "fasterdecoding" else name


def layout_prefix(layout: MedusaLayout) -> str:
    """Before all names that are written."""
    return _VLLM if layout == "vllm" else ""


def read_medusa_config(raw: Mapping[str, Any], stored: Mapping[str, Tensor]) -> MedusaFile:
    """Both layouts; `stored`: the tensors of the file. Raises ValueError for heads of another kind."""
    fields = Fields(raw)
    refuse_quantization(fields)
    fields.require_off({"logit_scale": (1,)})
    is_vllm = any(name.removeprefix(_VLLM).startswith(("blocks.", "lm_heads.")) for name in stored)
    read = _read_vllm if is_vllm else _read_fasterdecoding
    return read(fields, stored)


def _read_vllm(fields: Fields, stored: Mapping[str, Tensor]) -> MedusaFile:
    hidden_size, vocab_size = fields.integer("hidden_size"), fields.integer("vocab_size")
    given = fields.given("truncated_vocab_size")
    num_ids = fields.integer("truncated_vocab_size", 1, vocab_size) if given else vocab_size
    shares = fields.flag("original_lm_head") if fields.given("original_lm_head") else False
    has_bias = fields.flag("medusa_fc_bias") if fields.given("medusa_fc_bias") else False
    shape = MedusaShape(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_heads=_either(fields, "num_heads", "medusa_num_heads"),
        num_layers=_either(fields, "num_hidden_layers", "medusa_num_layers"),
        lm_head=LmHeadShape(hidden_size, num_ids, read_rank(fields, hidden_size)),
        shares_lm_head=shares,
    )
    prefix = _VLLM if any(name.startswith(_VLLM) for name in stored) else ""
    return _file(fields, shape, "vllm", prefix, has_bias)


def _read_fasterdecoding(fields: Fields, stored: Mapping[str, Tensor]) -> MedusaFile:
    prefix = MEDUSA_2 if any(name.startswith(MEDUSA_2) for name in stored) else ""
    num_layers = fields.integer("medusa_num_layers") if fields.given("medusa_num_layers") else 1
    ours = [name.removeprefix(prefix).split(".")[0] for name in stored if name.startswith(prefix)]
    counted = 1 + max((int(head) for head in ours if head.isdecimal()), default=-1)
    given = fields.given("medusa_num_heads")
    num_heads = max(counted, fields.integer("medusa_num_heads") if given else 1)
    sizes = stored.get(f"{prefix}0.{num_layers}.weight")
    if sizes is None or sizes.dim() != 2:
        raise ValueError(
            f"tensors missing: {prefix}0.{num_layers}.weight, a matrix, from which sizes are read"
        )
    vocab_size, hidden_size = sizes.shape
    fields.ignore(("hidden_size", "vocab_size", "num_hidden_layers"))
    shape = MedusaShape(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_heads=num_heads,
        num_layers=num_layers,
        lm_head=LmHeadShape(hidden_size, vocab_size, hidden_size),
        shares_lm_head=False,
    )
    return _file(fields, shape, "fasterdecoding", prefix, True)


def _file(
    fields: Fields, shape: MedusaShape, layout: MedusaLayout, prefix: str, has_bias: bool
) -> MedusaFile:
    base = fields.value("base_model_name_or_path")
    known = HeadDescription(
        target_model=base if isinstance(base, str) else "",
        target_hidden_size=shape.hidden_size,
        target_vocab_size=shape.vocab_size,
    )
    description = own_description(fields, known)
    fields.ignore((*HARMLESS_FIELDS, *_HARMLESS.split()))
    return MedusaFile(shape, description, layout, prefix, has_bias, unknown_fields(fields))


def _either(fields: Fields, *keys: str) -> int:
    """vLLM takes either spelling."""
    return fields.integer(next((key for key in keys if fields.given(key)), keys[0]))


def medusa_config(
    shape: MedusaShape, description: HeadDescription, layout: MedusaLayout, dtype: torch.dtype
) -> dict[str, Any]:
    """What `read_medusa_config` reads. ValueError for heads that the layout cannot say."""
    ours = {**dtype_name(dtype), KEY: description.to_json()}
    if layout == "fasterdecoding":
        is_plain = shape.lm_head == LmHeadShape(shape.hidden_size, shape.vocab_size, shape.hidden_size)
        if shape.shares_lm_head or not is_plain:
            raise ValueError(
                "the layout fasterdecoding has no trimmed, low-rank or shared LM heads: use vllm"
            )
        return {
            "medusa_num_heads": shape.num_heads,
            "medusa_num_layers": shape.num_layers,
            "base_model_name_or_path": description.target_model,
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            **ours,
        }
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "truncated_vocab_size": shape.lm_head.num_ids,
        "num_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "medusa_fc_bias": True,
        "original_lm_head": shape.shares_lm_head,
        **rank_fields(shape.lm_head),
        **ours,
    }
