"""What all layouts say alike: the rank of an LM head, and fields that nobody knows.

Low rank has one published spelling, TorchSpec's `lm_head_rank_divisor`. It cannot name every rank; for the others
`lm_head_rank` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from outrider.workers.draft_heads.description import KEY, HeadDescription, read_description
from outrider.workers.draft_heads.lm_head import LmHeadShape, rank_of
from outrider.workers.weights.fields import Fields

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def rank_fields(shape: LmHeadShape) -> dict[str, int]:
    """The fields that say the rank of a head: none for one matrix."""
    if not shape.is_low_rank:
        return {}
    divisor = shape.hidden_size // shape.rank
    if divisor >= 2 and rank_of(shape.hidden_size, divisor) == shape.rank:
        return {"lm_head_rank_divisor": divisor}
    return {"lm_head_rank": shape.rank}


def read_rank(fields: Fields, hidden_size: int) -> int:
    """The rank; the hidden size for one matrix."""
    if fields.given("lm_head_rank"):
        return fields.integer("lm_head_rank", 1, hidden_size - 1)
    if fields.given("lm_head_rank_divisor"):
        return rank_of(hidden_size, fields.integer("lm_head_rank_divisor", 2, hidden_size))
    return hidden_size


def own_description(fields: Fields, otherwise: HeadDescription) -> HeadDescription:
    """What the file says under our own key, completed by what can be known without it."""
    if not fields.given(KEY):
        return otherwise
    return read_description(fields.object(KEY)).or_else(otherwise)


def unknown_fields(fields: Fields, prefix: str = "") -> list[str]:
    """One line for all fields that nobody has read, [] without any."""
    unread = [prefix + key for key in fields.unread()]
    return (
        [f"fields not known here, so what they ask for would be left out: {', '.join(unread)}"]
        if unread
        else []
    )


def dtype_name(dtype: torch.dtype) -> dict[str, Any]:
    """As transformers' configurations say it."""
    return {"torch_dtype": DTYPE_NAMES[dtype]}
