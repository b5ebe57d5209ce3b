"""One rank's logits as sampling looks at them: on the host, or where a GPU left them.

Both answer the same questions for several rows at a time, with the same numbers but for the rounding of exp and
log: all ranks of a group use the same kind (`agreed_kernels`). A `DeviceShard` brings answers to the host, never
whole rows. `ShardLogits` is the shard on the host.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.noise import Float32Array, Int64Array, UInt32Array
from outrider.kernels.sample_shard import sample_shard
from outrider.kernels.selection import KernelSelection
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import (
    LOWEST,
    UInt64Array,
    best_of,
    drop_surplus,
    ids_of,
    pack_tokens,
    removed_by_id,
    unpack_tokens,
    with_ids,
)
from outrider.kernels.transfers import download, upload


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


class Foreseen(NamedTuple):
    """What will be asked of rows; a `DeviceShard` answers that with one copy to the host, the rest when it comes."""

    temperatures: Float32Array  # [num_rows]
    keys: UInt32Array  # [num_rows, 2]
    whole: Int64Array  # rows whose best tokens will be asked for
    num_best: int  # how many of these
    truncated: Int64Array  # rows whose likeliest tokens will be
    num_likeliest: int  # how many of these; 0: not known
    summed: Int64Array  # rows whose `exp_sums` will be, with these temperatures (1 for 0)


_NO_ROWS = np.zeros(0, dtype=np.int64)
NOTHING_FORESEEN = Foreseen(
    np.zeros(0, dtype=np.float32), np.zeros((0, 2), dtype=np.uint32), _NO_ROWS, 0, _NO_ROWS, 0, _NO_ROWS
)


class _Seen(NamedTuple):
    """Of all rows of a shard, answers that came to the host together."""

    maxima: Float32Array  # [num_rows]
    best: UInt64Array  # [num_whole, num_best], packed
    best_logits: Float32Array  # [num_whole, num_best]
    top: UInt64Array  # [num_truncated, num_likeliest], packed
    sums: npt.NDArray[np.float64]  # [num_summed], of exp((logit - own maximum) / temperature)


class DeviceShard:
    """A shard that stays on its device. `logits` [num_rows, shard_size] must not change while this is in use."""

    def __init__(
        self,
        logits: torch.Tensor,
        shard_ids: ShardIds,
        kernels: KernelSelection,
        foreseen: Foreseen = NOTHING_FORESEEN,
    ) -> None:
        """`kernels`: has `sample_shard`."""
        assert kernels.sample_shard
        self._logits = logits
        self._ids = shard_ids
        self._kernels = kernels
        self._foreseen = foreseen

    @cached_property
    def _seen(self) -> _Seen:
        """One copy to the device, some launches, one copy back."""
        wanted = self._foreseen
        divisors = np.where(wanted.temperatures == 0.0, np.float32(1.0), wanted.temperatures)
        numbers = (
            wanted.temperatures[wanted.whole], wanted.keys[wanted.whole].astype(np.int64), wanted.whole,
            wanted.truncated, wanted.summed, np.float32(1.0) / divisors[wanted.summed],
        )  # fmt: skip
        there = upload([torch.from_numpy(each) for each in numbers], self._logits.device)
        temperatures, keys, whole, truncated, summed, factors = there
        found = [self._logits.amax(dim=1)]
        if len(whole):
            part = self._some(wanted.whole, whole)
            found += self._winners(part, temperatures, keys, wanted.num_best)
        if len(truncated) and wanted.num_likeliest:
            found.append(self._packed(self._some(wanted.truncated, truncated), wanted.num_likeliest))
        if len(summed):
            x = self._some(wanted.summed, summed)
            x = x - x.amax(dim=1, keepdim=True).clamp_min(
                float(LOWEST)
            )  # a shard of removed tokens has no mass
            found.append((x * factors[:, None]).exp_().sum(dim=1, dtype=torch.float64))
        arrays = iter([tensor.numpy() for tensor in download(found)])
        maxima = next(arrays)
        best, top = np.zeros((0, 0), dtype=np.uint64), np.zeros((0, 0), dtype=np.uint64)
        best_logits = np.zeros((0, 0), dtype=np.float32)
        sums = np.zeros(0)
        if len(whole):
            best = self._ranked(next(arrays), next(arrays))
            best_logits = next(arrays)
        if len(truncated) and wanted.num_likeliest:
            top = self._unpacked(next(arrays))
        if len(summed):
            sums = next(arrays)
        return _Seen(maxima, best, best_logits, top, sums)

    def logits(self, rows: Int64Array, ids: Int64Array) -> Float32Array:
        if len(self._foreseen.temperatures):
            found, are_known = self._seen_logits(rows, ids)
            if are_known:
                return found
        indices = (torch.from_numpy(rows), torch.from_numpy(self._ids.columns(ids)))
        rows_there, columns = upload(indices, self._logits.device)
        return self._logits[rows_there, columns].cpu().numpy()

    def _seen_logits(self, rows: Int64Array, ids: Int64Array) -> tuple[Float32Array, bool]:
        """`logits` of tokens that were seen, and whether all were."""
        found = np.full(len(rows), np.nan, dtype=np.float32)
        top_logits, _ = unpack_tokens(self._seen.top)
        for known, packed, logits in (
            (self._foreseen.whole, self._seen.best, self._seen.best_logits),
            (self._foreseen.truncated, self._seen.top, top_logits),
        ):
            if packed.size:
                at = np.minimum(known.searchsorted(rows), len(known) - 1)
                is_it = (ids_of(packed[at]) == ids[:, None]) & (known[at] == rows)[:, None]
                here = is_it.any(axis=1).nonzero()[0]
                found[here] = logits[at[here], is_it[here].argmax(axis=1)]
        return found, not np.count_nonzero(np.isnan(found))

    def maxima(self, rows: Int64Array) -> Float32Array:
        if len(self._foreseen.temperatures):
            return self._seen.maxima[rows]
        return self._rows(rows).amax(dim=1).cpu().numpy()

    def exp_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        at, are_seen = _places(self._foreseen.summed, rows)
        if are_seen and np.array_equal(self._divisors(rows), temperatures):
            own = np.maximum(self._seen.maxima[rows], LOWEST).astype(np.float64)
            scale: npt.NDArray[np.float64] = np.exp((own - maxima) / temperatures)
            return self._seen.sums[at] * scale
        settings = (torch.from_numpy(maxima), torch.from_numpy(np.float32(1.0) / temperatures))
        largest, factors = upload(settings, self._logits.device)
        x = (self._rows(rows) - largest[:, None]) * factors[:, None]
        return x.exp_().sum(dim=1, dtype=torch.float64).cpu().numpy()

    def weighted_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        x = self._rows(rows) - self._tensor(maxima)[:, None]
        x = (x * self._tensor(np.float32(1.0) / temperatures)[:, None]).clamp_min(float(LOWEST))
        return (x * x.exp()).sum(dim=1, dtype=torch.float64).cpu().numpy()

    def largest(self, rows: Int64Array, count: int) -> Float32Array:
        at, are_seen = _places(self._foreseen.truncated, rows)
        if are_seen and self._has(count):
            values, _ = unpack_tokens(self._seen.top[at, :count])
            return np.ascontiguousarray(values)
        part = self._rows(rows)
        return part.topk(min(count, part.shape[1]), dim=1).values.cpu().numpy()

    def top(self, rows: Int64Array, count: int) -> UInt64Array:
        at, are_seen = _places(self._foreseen.truncated, rows)
        if are_seen and self._has(count):
            return self._seen.top[at, :count]
        return self._unpacked(self._packed(self._rows(rows), count).cpu().numpy())

    def _has(self, count: int) -> bool:
        """Whether so many of the likeliest tokens were foreseen."""
        foreseen = self._foreseen.num_likeliest
        return min(count, self._logits.shape[1]) <= foreseen

    def _divisors(self, rows: Int64Array) -> Float32Array:
        temperatures = self._foreseen.temperatures[rows]
        return np.where(temperatures == 0.0, np.float32(1.0), temperatures)

    @staticmethod
    def _packed(part: torch.Tensor, count: int) -> torch.Tensor:
        """int64 [n, at most count] of the largest logits of rows, in order; for `_unpacked`."""
        # `pack_tokens` upside down, so that it fits into a signed integer, of columns: no two are equal.
        bits = (part + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**32
        rising += 0xFFFFFFFF - torch.arange(part.shape[1], device=part.device)
        return rising.topk(min(count, part.shape[1]), dim=1).values

    def _unpacked(self, largest: Int64Array) -> UInt64Array:
        packed = np.uint64(2**63 - 1) - largest.view(np.uint64)
        return with_ids(packed, self._ids.of(ids_of(packed)))

    def best(
        self, rows: Int64Array, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        at, are_seen = _places(self._foreseen.whole, rows)
        if are_seen and count == self._foreseen.num_best:
            return self._seen.best[at]
        part = self._rows(rows)
        return self._best(part, temperatures, keys, count)

    def best_kept(
        self,
        rows: Int64Array,
        lowest: Float32Array,
        num_lowest: Int64Array,
        temperatures: Float32Array,
        keys: UInt32Array,
        count: int,
    ) -> UInt64Array:
        at, are_seen = _places(self._foreseen.truncated, rows)
        if are_seen and self._foreseen.num_likeliest:
            values, ids = unpack_tokens(self._seen.top[at])
            # All that is kept is among the likeliest, if these go below it or there are no others.
            ends = (values[:, -1] < lowest) | (values.shape[1] == self._logits.shape[1])
            best = np.empty((len(rows), count), dtype=np.uint64)
            here, rest = ends.nonzero()[0], (~ends).nonzero()[0]
            if len(here):
                kept = np.where(values[here] < lowest[here, None], np.float32(-np.inf), values[here])
                drop_surplus(kept, lowest[here], num_lowest[here])
                best[here] = best_of(kept, ids[here], temperatures[here], keys[here], count, self._ids.all)
            if len(rest):
                settings_of_rest = (lowest[rest], num_lowest[rest], temperatures[rest], keys[rest])
                best[rest] = self._best_kept_there(rows[rest], *settings_of_rest, count)
            return best
        return self._best_kept_there(rows, lowest, num_lowest, temperatures, keys, count)

    def _best_kept_there(
        self,
        rows: Int64Array,
        lowest: Float32Array,
        num_lowest: Int64Array,
        temperatures: Float32Array,
        keys: UInt32Array,
        count: int,
    ) -> UInt64Array:
        settings = (torch.from_numpy(lowest), torch.from_numpy(num_lowest))
        edges, nums = upload(settings, self._logits.device)
        part, edge = self._rows(rows), edges[:, None]
        equal = part == edge
        late = equal & (equal.cumsum(dim=1, dtype=torch.int32) > nums[:, None])
        return self._best(part.masked_fill((part < edge) | late, -torch.inf), temperatures, keys, count)

    def _best(
        self, part: torch.Tensor, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        """The best of all rows of `part`."""
        settings = (torch.from_numpy(temperatures), torch.from_numpy(keys.astype(np.int64)))
        divisors, noise = upload(settings, part.device)
        scores, columns, _ = (x.numpy() for x in download(self._winners(part, divisors, noise, count)))
        return self._ranked(scores, columns)

    def _ranked(self, scores: Float32Array, columns: Int64Array) -> UInt64Array:
        return removed_by_id(pack_tokens(scores, self._ids.of(columns)), self._ids.all)

    def _winners(
        self, part: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor, count: int
    ) -> list[torch.Tensor]:
        """Scores, columns and logits of the best of all rows of `part`, [n, count] each."""
        scores, columns = [], []
        left = part.clone() if count > 1 else part
        for remaining in reversed(range(count)):
            sample = sample_shard(left, temperatures, keys, self._ids, use_kernel=True)
            scores.append(sample.values[:, None])
            # Where nothing is left, or no law, there is no best token; it must not make the device go out of bounds.
            columns.append(self._columns(sample.ids).clamp_(0, part.shape[1] - 1)[:, None])
            if remaining:  # the winner leaves, the next one is sought
                left.scatter_(1, columns[-1], -torch.inf)
        if count == 1:
            return [*scores, *columns, part.gather(1, columns[0])]
        places = torch.cat(columns, 1)
        return [torch.cat(scores, 1), places, part.gather(1, places)]

    def _columns(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._ids.table
        return torch.searchsorted(table, ids) if len(table) else ids - self._ids.first

    def _rows(self, rows: Int64Array) -> torch.Tensor:
        if self._are_all(rows):
            return self._logits
        return gather_rows(self._logits, self._tensor(rows), self._kernels.gather_rows)

    def _some(self, rows: Int64Array, there: torch.Tensor) -> torch.Tensor:
        """`_rows`, with their numbers on the device."""
        return (
            self._logits
            if self._are_all(rows)
            else gather_rows(self._logits, there, self._kernels.gather_rows)
        )

    def _are_all(self, rows: Int64Array) -> bool:
        return np.array_equal(rows, np.arange(len(self._logits)))

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        (there,) = upload((torch.from_numpy(np.ascontiguousarray(values)),), self._logits.device)
        return there


def _places(known: Int64Array, rows: Int64Array) -> tuple[Int64Array, bool]:
    """Where rows, at least one, are among the known ones, ascending as they are, and whether all are."""
    if not len(known) or not len(rows):
        return rows, False
    at = np.minimum(known.searchsorted(rows), len(known) - 1)
    return at, bool(np.array_equal(known[at], rows))
