"""One rank's logits as sampling looks at them: on the host, or where a GPU left them.

Both answer the same questions for several rows at a time, with the same numbers but for the rounding of exp and
log: all ranks of a group use the same kind (`agreed_kernels`). A `DeviceShard` brings answers to the host, never
whole rows. `ShardLogits` is the shard on the host.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.noise import Float32Array, Int64Array, UInt32Array
from outrider.kernels.sample_shard import sample_shard
from outrider.kernels.selection import KernelSelection
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import LOWEST, UInt64Array, ids_of, pack_tokens, removed_by_id, with_ids


class Shard(Protocol):
    """Logits of several rows over the token ids of one rank; packed tokens are those of `pack_tokens`.

    `rows` are int64 [n], ascending. Rows without a finite maximum over the whole vocabulary may be asked for their
    maxima only.
    """

    def logits(self, rows: Int64Array, ids: Int64Array) -> Float32Array:
        """[n]: the logit of ids[i] in rows[i]; the ids are in this shard."""
        ...

    def maxima(self, rows: Int64Array) -> Float32Array:
        """[n]: the largest logit of each row; NaN if the row has one."""
        ...

    def exp_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        """[n]: of each row the sum of exp((logit - maximum) / temperature), for the finite maxima given."""
        ...

    def weighted_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        """[n]: of each row the sum of x * exp(x) where x = (logit - maximum) / temperature, finite maxima given."""
        ...

    def largest(self, rows: Int64Array, count: int) -> Float32Array:
        """[n, at most count]: the largest logits of each row in order; all, if there are fewer."""
        ...

    def top(self, rows: Int64Array, count: int) -> UInt64Array:
        """[n, at most count]: packed tokens of the largest logits in order; all, if there are fewer."""
        ...

    def best(
        self, rows: Int64Array, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        """[n, count]: packed tokens of the best scores logit / temperature + noise of each row, in order.

        Temperature 0 ranks by the logits alone. `count` is at most the size of the shard.
        """
        ...

    def best_kept(
        self,
        rows: Int64Array,
        lowest: Float32Array,
        num_lowest: Int64Array,
        temperatures: Float32Array,
        keys: UInt32Array,
        count: int,
    ) -> UInt64Array:
        """As `best`, of rows that keep logits above lowest [n] and the first num_lowest [n] that equal it.

        The other tokens count as removed. Temperatures > 0.
        """
        ...


class DeviceShard:
    """A shard that stays on its device. `logits` [num_rows, shard_size] must not change while this is in use."""

    def __init__(self, logits: torch.Tensor, shard_ids: ShardIds, kernels: KernelSelection) -> None:
        """`kernels`: has `sample_shard`."""
        assert kernels.sample_shard
        self._logits = logits
        self._ids = shard_ids
        self._kernels = kernels

    def logits(self, rows: Int64Array, ids: Int64Array) -> Float32Array:
        return self._logits[self._tensor(rows), self._tensor(self._ids.columns(ids))].cpu().numpy()

    def maxima(self, rows: Int64Array) -> Float32Array:
        return self._rows(rows).amax(dim=1).cpu().numpy()

    def exp_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        x = self._rows(rows) - self._tensor(maxima)[:, None]
        x *= self._tensor(np.float32(1.0) / temperatures)[:, None]
        return x.exp_().sum(dim=1, dtype=torch.float64).cpu().numpy()

    def weighted_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        x = self._rows(rows) - self._tensor(maxima)[:, None]
        x = (x * self._tensor(np.float32(1.0) / temperatures)[:, None]).clamp_min(float(LOWEST))
        return (x * x.exp()).sum(dim=1, dtype=torch.float64).cpu().numpy()

    def largest(self, rows: Int64Array, count: int) -> Float32Array:
        part = self._rows(rows)
        return part.topk(min(count, part.shape[1]), dim=1).values.cpu().numpy()

    def top(self, rows: Int64Array, count: int) -> UInt64Array:
        part = self._rows(rows)
        # `pack_tokens` upside down, so that it fits into a signed integer, of columns: no two are equal.
        bits = (part + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**32
        rising += 0xFFFFFFFF - torch.arange(part.shape[1], device=part.device)
        largest = rising.topk(min(count, part.shape[1]), dim=1).values.cpu().numpy()
        packed = np.uint64(2**63 - 1) - largest.view(np.uint64)
        return with_ids(packed, self._ids.of(ids_of(packed)))

    def best(
        self, rows: Int64Array, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        part = self._rows(rows)
        return self._best(part.clone() if count > 1 else part, temperatures, keys, count)

    def best_kept(
        self,
        rows: Int64Array,
        lowest: Float32Array,
        num_lowest: Int64Array,
        temperatures: Float32Array,
        keys: UInt32Array,
        count: int,
    ) -> UInt64Array:
        part, edge = self._rows(rows), self._tensor(lowest)[:, None]
        equal = part == edge
        late = equal & (equal.cumsum(dim=1, dtype=torch.int32) > self._tensor(num_lowest)[:, None])
        return self._best(part.masked_fill((part < edge) | late, -torch.inf), temperatures, keys, count)

    def _best(
        self, part: torch.Tensor, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        """The best of all rows of `part`, which for more than one winner is used up."""
        values, columns = [], []
        for remaining in reversed(range(count)):
            sample = sample_shard(part, temperatures, keys, self._ids, use_kernel=True)
            values.append(sample.values)
            # Where nothing is left there is no best token; it must not make the device write out of bounds.
            columns.append(self._columns(sample.ids).clamp_(0, part.shape[1] - 1))
            if remaining:  # the winner leaves, the next one is sought
                part.scatter_(1, columns[-1][:, None], -torch.inf)
        ids = self._ids.of(torch.stack(columns, 1).cpu().numpy())
        return removed_by_id(pack_tokens(torch.stack(values, 1).cpu().numpy(), ids), self._ids.all)

    def _columns(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._ids.table
        return torch.searchsorted(table, ids) if len(table) else ids - self._ids.first

    def _rows(self, rows: Int64Array) -> torch.Tensor:
        if np.array_equal(rows, np.arange(len(self._logits))):
            return self._logits
        return gather_rows(self._logits, self._tensor(rows), self._kernels.gather_rows)

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(values, device=self._logits.device)
