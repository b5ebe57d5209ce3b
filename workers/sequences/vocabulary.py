"""Which token each column of a head, or each row of an embedding, stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Vocabulary(Protocol):
    """Token ids in ascending order of columns 0, 1, 2, ...; all of a model's, those of one rank, or a chosen few."""

    def __len__(self) -> int:
        """Columns."""
        ...

    def ids(self, columns: Tensor) -> Tensor:
        """Token ids of columns, both int64 of any shape."""
        ...

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of token ids, int64 of the same shape, and whether each id is here; column 0 where it is not."""
        ...


@dataclass(frozen=True)
class VocabularyRange:
    """The ids first, first + 1, ..., end - 1."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    def ids(self, columns: Tensor) -> Tensor:
        return columns + self.first

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        here = (ids >= self.first) & (ids < self.end)
        return (ids - self.first).masked_fill(~here, 0), here


class VocabularyTable:
    """Any ids, each once, e.g. the frequent ones that a drafter's head keeps (VocabTrim, arXiv 2506.22694)."""

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        """`ids`: ascending; at least one."""
        self._ids = torch.tensor(ids, dtype=torch.int64, device=device)
        assert bool((self._ids.diff() > 0).all()), "ids must ascend"

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, columns: Tensor) -> Tensor:
        return self._ids[columns.to(self._ids.device)]

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.searchsorted(self._ids, ids).clamp_(max=len(self) - 1)
        here = self._ids[columns] == ids
        return columns.masked_fill(~here, 0), here
