"""From token ids to rows of the embedding matrix, of which a rank has a part."""

from typing import Protocol

import torch
from torch import Tensor

from outrider.kernels.gather_rows import gather_rows
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING


class Embedding(Protocol):
    """The rows of some token ids."""

    @property
    def vocabulary(self) -> VocabularyRange:
        """The ids whose rows are here."""
        ...

    def rows(self, columns: Tensor, use_kernel: bool) -> Tensor:
        """[N, hidden] of columns int64 [N] of the vocabulary."""
        ...


class MatrixEmbedding:
    """A matrix [len(vocabulary), hidden] in memory."""

    def __init__(self, matrix: Tensor, vocabulary: VocabularyRange) -> None:
        self.matrix = matrix
        self.vocabulary = vocabulary

    def rows(self, columns: Tensor, use_kernel: bool) -> Tensor:
        return gather_rows(self.matrix, columns, use_kernel)


class StoredEmbedding:
    """Rows read from the checkpoint when they are asked for: a packed head has no rows to be read from."""

    def __init__(
        self, source: WeightSource, name: str, vocabulary: VocabularyRange, dtype: torch.dtype
    ) -> None:
        self._source = source
        self._name = name
        self._dtype = dtype
        self.vocabulary = vocabulary

    def rows(self, columns: Tensor, use_kernel: bool) -> Tensor:
        return self._source.read_rows(self._name, self.vocabulary.ids(columns), self._dtype)


def embedding_of(source: WeightSource, dtype: torch.dtype, device: torch.device) -> Embedding:
    """A model's whole embedding, for who has none of its other weights: on a CPU it stays in the checkpoint, of which
    a drafter needs a few rows at a time; on a GPU it is in its memory."""
    ids = VocabularyRange(0, source.config.vocab_size)
    if device.type == "cpu":
        return StoredEmbedding(source, EMBEDDING, ids, dtype)
    every = slice(None)
    return MatrixEmbedding(source.read(EMBEDDING, every, every, dtype).to(device), ids)
