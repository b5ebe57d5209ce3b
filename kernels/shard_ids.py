"""Which token each column of one rank's logits stands for, as the sampler looks it up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Int64Array


class ShardIds:
    """The token ids of columns 0, 1, 2, ..., ascending: consecutive ones, or any.

    Because they ascend, columns are in the order of their ids: ties may go by either.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        """`ids`: int64 [shard_size], at least one; a table for a kernel stays where it is."""
        self.all: Int64Array = ids.to("cpu").numpy()
        """[shard_size]"""
        assert len(self.all) > 0
        assert np.all(self.all[1:] > self.all[:-1]), "ids must ascend"
        self.first = int(self.all[0])
        self._is_consecutive = int(self.all[-1]) - self.first == len(self.all) - 1
        self.table = ids[:0] if self._is_consecutive else ids
        """int64 [shard_size] where the ids were given; no elements if they are consecutive."""

    def table_on(self, device: torch.device) -> torch.Tensor:
        """`table` for a kernel there; a copy only where there is something to copy."""
        if len(self.table):
            return self.table.to(device)
        return torch.empty(0, dtype=torch.int64, device=device)

    @classmethod
    def from_first(cls, first: int, count: int) -> ShardIds:
        """first, first + 1, ..."""
        return cls(torch.arange(first, first + count))

    def __len__(self) -> int:
        return len(self.all)

    def of(self, columns: Int64Array) -> Int64Array:
        """Token ids of columns, of any shape."""
        return columns + self.first if self._is_consecutive else self.all[columns]

    def columns(self, ids: Int64Array) -> Int64Array:
        """Columns of token ids that are in this shard, of any shape."""
        return ids - self.first if self._is_consecutive else self.all.searchsorted(ids)

    def are_here(self, ids: Int64Array) -> npt.NDArray[np.bool_]:
        """Whether token ids, of any shape, are in this shard."""
        if self._is_consecutive:
            return (ids >= self.first) & (ids < self.first + len(self))
        return self.all[np.minimum(self.all.searchsorted(ids), len(self) - 1)] == ids
