"""From the last hidden rows to logits."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from outrider.workers.model.linear import Linear
from outrider.workers.sequences.vocabulary import Vocabulary


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
    """One product: `linear` has a row for each token of the vocabulary.

    All rows of a model's matrix over a `VocabularyRange`; or the rows of a `VocabularyTable`, in its order, which is
    a trimmed head (VocabTrim, arXiv 2506.22694).
    """

    linear: Linear
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        assert self.linear.out_features == len(self.vocabulary), "a row for each token"

    def __call__(self, normed: Tensor) -> Tensor:
        return self.linear(normed).float()


@dataclass(frozen=True)
class LowRankHead:
    """Two products with nothing between them, up(down(normed)), no bias (SlimSpec, arXiv 2605.10453).

    down: hidden -> rank, `lm_head.down.weight` [rank, hidden]; up: rank -> tokens, `lm_head.up.weight`
    [len(vocabulary), rank] (names as TorchSpec writes them).
    """

    down: Linear
    up: Linear
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        assert self.down.out_features == self.up.in_features, "the same rank"
        assert self.up.out_features == len(self.vocabulary), "a row for each token"

    def __call__(self, normed: Tensor) -> Tensor:
        return self.up(self.down(normed)).float()
