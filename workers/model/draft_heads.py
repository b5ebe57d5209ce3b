"""Draft heads as the server runs them: the modules that were trained, with their matrices in the fastest layout."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from outrider.workers.draft_heads.lm_head import DenseLmHead, LmHead, LowRankLmHead
from outrider.workers.model.head import Head, LinearHead, LowRankHead
from outrider.workers.model.linear import Linear, make_linear
from outrider.workers.sequences.vocabulary import Vocabulary, VocabularyRange, VocabularyTable

_Module = TypeVar("_Module", bound=nn.Module)


def vocabulary_of(ids: Tensor, vocab_size: int) -> Vocabulary:
    """The tokens `ids` (int64 [n], ascending) of a vocabulary."""
    if len(ids) == vocab_size:
        return VocabularyRange(0, vocab_size)
    return VocabularyTable(ids.tolist(), ids.device)


def served_head(lm_head: LmHead, vocab_size: int, packed: bool) -> Head:
    """A drafter's LM head, in the dtype and on the device of its weights.

    packed: keep matrices in the processor's blocked layout, see `make_linear`.
    """
    vocabulary = vocabulary_of(lm_head.ids, vocab_size)
    if isinstance(lm_head, LowRankLmHead):
        return LowRankHead(_linear(lm_head.down, packed), _linear(lm_head.up, packed), vocabulary)
    assert isinstance(lm_head, DenseLmHead)
    matrix = make_linear(lm_head.weight.data, torch.empty(0), packed, exact_sums=False)
    return LinearHead(matrix, vocabulary)


def for_serving(
    module: _Module, vocab_size: int, dtype: torch.dtype, device: torch.device, packed: bool
) -> _Module:
    """The module itself, cast and moved, with its linear layers and LM heads replaced: what it computes is written
    once, for the trainer and here. Its LM heads give float32 logits."""
    module.to(device, dtype).requires_grad_(False).eval()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LmHead):
                setattr(parent, name, _ServedLmHead(child, vocab_size, packed))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, _Product(_linear(child, packed)))
    return module


class _Product(nn.Module):
    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x)


class _ServedLmHead(nn.Module):
    """In the place of an `LmHead`: its logits and its ids."""

    def __init__(self, lm_head: LmHead, vocab_size: int, packed: bool) -> None:
        super().__init__()
        self.ids = lm_head.ids
        self._head = served_head(lm_head, vocab_size, packed)

    def forward(self, normed: Tensor) -> Tensor:
        return self._head(normed)


def _linear(linear: nn.Linear, packed: bool) -> Linear:
    bias = torch.empty(0) if linear.bias is None else linear.bias.data
    return make_linear(linear.weight.data, bias.to(linear.weight.device), packed, exact_sums=False)
