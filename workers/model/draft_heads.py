"""Draft heads as the server runs them: the modules that were trained, with their matrices in the fastest layout."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from outrider.workers.draft_heads.lm_head import DenseLmHead, LmHead, LowRankLmHead
from outrider.workers.model.dynamic_int8 import DynamicInt8Linear, dynamic_int8_works
from outrider.workers.model.head import Head, LinearHead, LowRankHead
from outrider.workers.model.linear import Linear, make_linear
from outrider.workers.sequences.vocabulary import Vocabulary, VocabularyRange, VocabularyTable

_Module = TypeVar("_Module", bound=nn.Module)


def vocabulary_of(ids: Tensor, vocab_size: int) -> Vocabulary:
    """The tokens `ids` (int64 [n], ascending) of a vocabulary."""
    if len(ids) == vocab_size:
        return VocabularyRange(0, vocab_size)
    return VocabularyTable(ids.tolist(), ids.device)


def served_head(lm_head: LmHead, vocab_size: int, packed: bool, int8: bool = False) -> Head:
    """A drafter's LM head, in the dtype and on the device of its weights.

    packed: keep matrices in the processor's blocked layout, see `make_linear`.
    int8: multiply in 8 bits, see `for_serving`.
    """
    vocabulary = vocabulary_of(lm_head.ids, vocab_size)
    if isinstance(lm_head, LowRankLmHead):
        down, up = (_linear(part, packed, int8) for part in (lm_head.down, lm_head.up))
        return LowRankHead(down, up, vocabulary)
    assert isinstance(lm_head, DenseLmHead)
    return LinearHead(_product(lm_head.weight.data, torch.empty(0), packed, int8), vocabulary)


def for_serving(
    module: _Module,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    int8: bool = False,
) -> _Module:
    """The module itself, cast and moved, with its linear layers and LM heads replaced: what it computes is written
    once, for the trainer and here. Its LM heads give float32 logits.

    int8: multiply in 8 bits, where that works on the device, see `dynamic_int8`.
    """
    module.to(device, dtype).requires_grad_(False).eval()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LmHead):
                setattr(parent, name, _ServedLmHead(child, vocab_size, packed, int8))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, _Product(_linear(child, packed, int8)))
    return module


class _Product(nn.Module):
    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x)


class _ServedLmHead(nn.Module):
    """In the place of an `LmHead`: its logits and its ids."""

    def __init__(self, lm_head: LmHead, vocab_size: int, packed: bool, int8: bool) -> None:
        super().__init__()
        self.ids = lm_head.ids
        self._head = served_head(lm_head, vocab_size, packed, int8)

    def forward(self, normed: Tensor) -> Tensor:
        return self._head(normed)


def _linear(linear: nn.Linear, packed: bool, int8: bool) -> Linear:
    bias = torch.empty(0) if linear.bias is None else linear.bias.data
    return _product(linear.weight.data, bias.to(linear.weight.device), packed, int8)


def _product(weight: Tensor, bias: Tensor, packed: bool, int8: bool) -> Linear:
    if int8 and weight.device.type == "cpu" and dynamic_int8_works():
        return DynamicInt8Linear.rounding(weight, bias)
    return make_linear(weight, bias, packed, exact_sums=False)
