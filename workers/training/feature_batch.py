"""What a trainer reads of a batch of texts: tokens, the target's rows by layer, and its law at every position."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from outrider.workers.training.data import TrainingText
from outrider.workers.training.vocabulary_loss import SoftTargets

LAST = "last"


def layer_name(layer: int) -> str:
    """Of the rows that enter a layer; `LAST` is of those that leave the last one, after the final norm."""
    return f"layer {layer}"


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Texts back to back, N tokens in all, and the target's rows at each of them.

    What decides which rows a loss reads stays on the host, where it is looked at; a device that is asked for it would
    have to finish its work first.

    Attributes:
        lengths: tokens of each text.
        tokens: int64 [N], on the host.
        is_label: bool [N]: a loss may be on guessing this token; on the host.
        greedy: int64 [N], the target's likeliest next token, of all of its vocabulary; on the host.
        taps: [N, taps * hidden], inputs of the tapped layers side by side; no columns where none is asked for.
        normed: [N, hidden], the last rows after the final norm; no columns where they are not asked for.
        soft: the target's law of the next token, over the head's ids.
    """

    lengths: list[int]
    tokens: Tensor
    is_label: Tensor
    greedy: Tensor
    taps: Tensor
    normed: Tensor
    soft: SoftTargets

    @property
    def device(self) -> torch.device:
        """Of the rows."""
        return self.taps.device

    def without_labels(self) -> FeatureBatch:
        """The same, with nothing to learn: for a rank that has no text of its own in a forward."""
        return replace(self, is_label=torch.zeros_like(self.is_label))

    def to(self, device: torch.device) -> FeatureBatch:
        """The same with the rows on another device."""
        soft = SoftTargets(self.soft.columns.to(device), self.soft.log_probs.to(device))
        return replace(self, taps=self.taps.to(device), normed=self.normed.to(device), soft=soft)


@dataclass(frozen=True)
class WantedRows:
    """Which of the target's rows a method reads.

    Attributes:
        taps: layers, whose inputs are read.
        normed: whether the last rows after the final norm are read.
        ids: int64 [V'], over which the target's law is.
        top_k: of that law.
    """

    taps: tuple[int, ...]
    normed: bool
    ids: Tensor
    top_k: int

    @property
    def law_name(self) -> str:
        """Of the law, by what decides it besides the last rows."""
        return f"law {self.top_k} {hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()}"

    @property
    def names(self) -> list[str]:
        """What is read, each kept by itself, so that other methods and other heads find what they share."""
        return [*map(layer_name, self.taps), *([LAST] if self.normed else []), self.law_name]

    def bytes_per_token(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Of all that is kept, at most."""
        top_k = min(self.top_k, len(self.ids))
        return (len(self.taps) + 1) * hidden_size * dtype.itemsize + top_k * 6 + 4


class BatchReader(Protocol):
    """Gives a batch of texts with the target's rows."""

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        """These texts, back to back. At least one."""
        ...


class TokensOnly:
    """For who runs the target itself: no rows, no laws."""

    def __init__(self, texts: Sequence[TrainingText]) -> None:
        self._texts = texts

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        return joined([self._texts[index] for index in indices], None, [])


def joined(
    texts: Sequence[TrainingText],
    wanted: WantedRows | None,
    parts: Sequence[Mapping[str, Mapping[str, Tensor]]],
) -> FeatureBatch:
    """Texts with what was computed of them, by name tensors by name [tokens, ...], in parts back to back; no rows at
    all where nothing is wanted."""
    num_tokens = sum(len(text.tokens) for text in texts)

    def column(name: str, key: str) -> Tensor:
        return torch.cat([part[name][key] for part in parts]) if parts else torch.empty(num_tokens, 0)

    law = wanted.law_name if wanted else ""
    taps = [column(layer_name(layer), "rows") for layer in wanted.taps] if wanted else []
    normed = column(LAST, "normed") if wanted and wanted.normed else torch.empty(num_tokens, 0)
    soft = SoftTargets(column(law, "columns").long(), column(law, "log_probs").float())
    empty = soft.log_probs.new_empty(num_tokens, 0)
    return FeatureBatch(
        **on_host(texts),
        greedy=column(law, "greedy").long().cpu(),
        taps=torch.cat(taps, dim=1) if taps else empty,
        normed=normed if normed.shape[1] else empty,
        soft=soft,
    )


class _OnHost(TypedDict):
    """What a batch has of its texts."""

    lengths: list[int]
    tokens: Tensor
    is_label: Tensor


def on_host(texts: Sequence[TrainingText]) -> _OnHost:
    """What a batch of these texts has of them."""
    learned = [np.arange(len(text.tokens)) >= max(1, text.num_unlearned) for text in texts]
    return {
        "lengths": [len(text.tokens) for text in texts],
        "tokens": torch.from_numpy(np.concatenate([text.tokens for text in texts]).astype(np.int64)),
        "is_label": torch.from_numpy(np.concatenate(learned)),
    }
