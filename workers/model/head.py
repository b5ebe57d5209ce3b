"""From the last hidden rows to logits."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from outrider.workers.model.linear import Linear
from outrider.workers.model.vocabulary import Vocabulary


class Head(Protocol):
    """Logits of the tokens of a vocabulary: a model's own, some of them, all by two small matrices, ..."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The token of each logit."""
        ...

    def __call__(self, normed: Tensor) -> Tensor:
        """Hidden rows [M, hidden], after the final norm -> float32 [M, len(vocabulary)]."""
        ...


@dataclass(frozen=True)
class LinearHead:
    """One product: `linear` has a row for each token of the vocabulary."""

    linear: Linear
    vocabulary: Vocabulary

    def __call__(self, normed: Tensor) -> Tensor:
        return self.linear(normed).float()


@dataclass(frozen=True)
class LowRankHead:
    """Two products with nothing between them: hidden -> rank -> vocabulary (SlimSpec, arXiv 2605.10453)."""

    down: Linear
    up: Linear
    vocabulary: Vocabulary

    def __call__(self, normed: Tensor) -> Tensor:
        return self.up(self.down(normed)).float()
