"""The CPU path of sampling: reductions over one rank's shard of the vocabulary.

The token of a row is the argmax of logit / temperature + Gumbel(key, id), ties to the smaller id. All rows go
through each operation together. The exact noise is only computed for tokens that can still win, which changes
the cost and never the result: -log of its uniform bounds it from above. In a large vocabulary, where hashing all
ids would cost more than everything else, fewer tokens are looked at:

- The maximum of every block of 128 logits is taken once; the blocks that hold the likeliest tokens follow.
- Noise above `_LUCKY_GUMBEL` goes to few ids, and inverting the hash lists them. Every other token must come
  within that distance of the best score known so far, or it has lost. Where a law is so flat that this leaves most
  of them, all ids are hashed: then only much noise wins.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import (
    Float32Array,
    Int64Array,
    UInt32Array,
    gumbel_from_hash,
    hash_rows,
    ids_with_hash_below,
)
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import (
    FEW,
    LOWEST,
    PART,
    UInt64Array,
    best_of,
    count_true,
    drop_surplus,
    exponentials,
    largest_hashes,
    leaders_of,
    lower_by_rounding,
    pack_tokens,
    padded,
    parts_of_rows,
)

_BLOCK = 128  # logits per block maximum
_SMALL = 512  # vocabulary up to which whole rows are sorted and searched
DENSE = 8192
"""Vocabulary up to which all ids are hashed."""
_LARGE_PART = 4  # rows of a large vocabulary worked on at once
_LUCKY_HASHES = 2**14  # hashes below this are found by inverting; one id in 2^18 has one
_LUCKY_GUMBEL = 12.48  # upper bound of the noise of all other ids: -log(-log(1 - 2^-18)) = 12.4766
_FLAT = 0.2  # share of the tokens that may win from which on all ids are hashed
_STRIDE = 16  # every so many are looked at to estimate it
_FIRST_BLOCKS = 32  # likeliest blocks that give the first bound on the best score


class ShardLogits:
    """Logits of several rows over one shard of the vocabulary, with the reductions sampling needs.

    The memory of `logits` (float32 [num_rows, shard_size], contiguous, on the CPU) is shared and must not
    change while this object is in use. Rows that hold NaN or +inf have a maximum and nothing else.
    """

    def __init__(self, logits: torch.Tensor, shard_ids: ShardIds) -> None:
        assert logits.dtype == torch.float32
        assert logits.dim() == 2
        assert logits.shape[1] == len(shard_ids)
        logits = logits.detach().contiguous()
        self._ids = shard_ids
        self._rows = logits.numpy()  # [num_rows, shard_size]
        self._size = logits.shape[1]
        self._logits = logits

    @cached_property
    def _maxima(self) -> Float32Array:
        """[num_rows, num_blocks]; the last block may be short."""
        full = torch.from_numpy(self._full_blocks).amax(-1)
        num_in_full = full.shape[1] * _BLOCK
        if self._size == num_in_full:
            return full.numpy()
        rest = self._logits[:, num_in_full:].amax(-1, keepdim=True)
        return torch.cat([full, rest], dim=1).numpy()

    @cached_property
    def _full_blocks(self) -> Float32Array:
        """[num_rows, num_full_blocks, _BLOCK], without the last block if it is short."""
        num_full = self._size // _BLOCK
        return self._logits[:, : num_full * _BLOCK].unflatten(1, (num_full, _BLOCK)).numpy()

    @cached_property
    def _row_maxima(self) -> Float32Array:
        return self._rows.max(axis=1) if self._size <= _SMALL else self._maxima.max(axis=1)

    def logits(self, rows: Int64Array, ids: Int64Array) -> Float32Array:
        """[n]: the logit of ids[i] in rows[i]; the ids are in this shard."""
        return self._of_columns(rows, self._ids.columns(ids))

    def maxima(self, rows: Int64Array) -> Float32Array:
        """[n]: the largest logit of each row; NaN if the row has one."""
        return self._row_maxima[rows]

    def exp_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        """[n]: of each row the sum over the shard of exp((logit - maximum) / temperature), finite maxima given."""
        sums = np.empty(len(rows))
        for part in parts_of_rows(len(rows), self._size):
            x = exponentials(self._some(rows[part]), maxima[part], temperatures[part])
            np.add.reduce(x, axis=1, dtype=np.float64, out=sums[part])
        return sums

    def masses_from(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array, lowest: Float32Array
    ) -> tuple[Float32Array, Float32Array]:
        """[n] each: `exp_sums`, and those of the logits >= lowest [n] alone, both to about 1e-6."""
        sums, sums_from = np.empty((2, len(rows)), dtype=np.float32)
        for part in parts_of_rows(len(rows), self._size):
            values = self._some(rows[part])
            x = exponentials(values, maxima[part], temperatures[part])
            np.add.reduce(x, axis=1, out=sums[part])
            x *= values >= lowest[part, None]
            np.add.reduce(x, axis=1, out=sums_from[part])
        return sums, sums_from

    def weighted_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        """[n]: of each row the sum over the shard of x * exp(x) where x = (logit - maximum) / temperature, finite
        maxima given."""
        sums = np.empty(len(rows))
        for part in parts_of_rows(len(rows), self._size):
            x = self._some(rows[part]) - maxima[part, None]
            x /= temperatures[part, None]
            np.maximum(x, LOWEST, out=x)  # a removed token weighs nothing
            np.sum(x * np.exp(x), axis=1, dtype=np.float64, out=sums[part])
        return sums

    def largest(self, rows: Int64Array, count: int) -> Float32Array:
        """[n, at most count]: the largest logits of each row in order; all, if there are fewer."""
        count = min(count, self._size)
        parts = self._parts(len(rows))
        if len(parts) == 1:
            return self._largest(rows, count)
        values = np.empty((len(rows), count), dtype=np.float32)
        for part in parts:
            values[part] = self._largest(rows[part], count)
        return values

    def _largest(self, rows: Int64Array, count: int) -> Float32Array:
        found = self._some(rows)
        if self._size > _SMALL:
            found, _ = self._at_least(rows, self._lower_bounds(rows, count))
        falling = -found
        falling.sort(axis=1)
        falling = falling[:, :count]
        return np.negative(falling, out=falling)

    def top(self, rows: Int64Array, count: int) -> UInt64Array:
        """[n, at most count]: packed tokens of the largest logits in order; all, if there are fewer."""
        count = min(count, self._size)
        packed = np.empty((len(rows), count), dtype=np.uint64)
        for part in self._parts(len(rows)):
            if self._size <= _SMALL and count <= FEW:
                values, columns = leaders_of(self._some(rows[part]), count)
                packed[part] = pack_tokens(values, self._ids.of(columns))
                if np.count_nonzero(values[:, -1] == -np.inf) == 0:
                    continue  # removed tokens would not come in the order of their ids
            found = self._at_least(rows[part], self._lower_bounds(rows[part], count))
            packed[part] = np.sort(pack_tokens(*found), axis=1)[:, :count]
        return packed

    def best(
        self, rows: Int64Array, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        """[n, count]: packed tokens of the best scores logit / temperature + noise of each row, in order.

        Temperature 0 ranks by the logits alone. `count` is at most the size of the shard.
        """
        if not np.count_nonzero(temperatures):
            return self._likeliest(rows) if count == 1 else self.top(rows, count)
        greedy, noisy = (temperatures == 0.0).nonzero()[0], temperatures.nonzero()[0]
        best = np.empty((len(rows), count), dtype=np.uint64)
        if len(greedy):
            best[greedy] = self._likeliest(rows[greedy]) if count == 1 else self.top(rows[greedy], count)
        for part in self._parts(len(noisy)):
            chosen = noisy[part]
            if self._size <= DENSE:
                values, ids = self._some(rows[chosen]), self._ids.all[None]
            else:
                values, ids = self._possible(rows[chosen], temperatures[chosen], keys[chosen], count)
            best[chosen] = best_of(values, ids, temperatures[chosen], keys[chosen], count, self._ids.all)
        return best

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
        best = np.empty((len(rows), count), dtype=np.uint64)
        for part in self._parts(len(rows)):
            values, ids = self._at_least(rows[part], lowest[part])
            drop_surplus(values, lowest[part], num_lowest[part])
            best[part] = best_of(values, ids, temperatures[part], keys[part], count, self._ids.all)
        return best

    def _of_columns(self, rows: Int64Array, columns: Int64Array) -> Float32Array:
        return self._rows.reshape(-1)[rows * self._size + columns]

    def _some(self, rows: Int64Array) -> Float32Array:
        if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1:  # they ascend
            return self._rows[int(rows[0]) : int(rows[0]) + len(rows)]
        return self._rows[rows]

    def _parts(self, num_rows: int) -> list[slice]:
        return parts_of_rows(num_rows, PART // _LARGE_PART if self._size > DENSE else self._size)

    def _likeliest(self, rows: Int64Array) -> UInt64Array:
        """[n, 1]: packed tokens of the largest logits, the first of equals."""
        if self._size <= _SMALL:
            values = self._some(rows)
            columns = values.argmax(axis=1)
            largest = values.reshape(-1)[np.arange(len(rows)) * self._size + columns]
            return pack_tokens(largest, self._ids.of(columns))[:, None]
        first = self._maxima[rows].argmax(axis=1)[:, None] * _BLOCK
        inside = np.minimum(first + np.arange(_BLOCK), self._size - 1)
        columns = np.take_along_axis(
            inside, self._rows[rows[:, None], inside].argmax(axis=1)[:, None], axis=1
        )[:, 0]
        return pack_tokens(self._rows[rows, columns], self._ids.of(columns))[:, None]

    def _possible(
        self, rows: Int64Array, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> tuple[Float32Array, Int64Array]:
        """Logits and ids, [n, width] each, with all that can be among the `count` best of each row."""
        values, ids = self._at_least(rows, self._lower_bounds(rows, max(count, _FIRST_BLOCKS)))
        scores = values / temperatures[:, None]
        scores += gumbel_from_hash(hash_rows(keys, ids))
        bounds = np.partition(scores, -count, axis=1)[:, -count]
        lower_by_rounding(bounds)
        # Tokens below a cut would need more noise than any but the lucky ids have.
        cuts = (bounds - np.float32(_LUCKY_GUMBEL)) * temperatures
        with np.errstate(invalid="ignore"):  # no limit where every token is removed
            limits = largest_hashes(bounds - self.maxima(rows) / temperatures)
        # Where a law is so flat that many could win, all ids are hashed: few have as much noise as that takes.
        some = self._some(rows)[:, ::_STRIDE]
        is_flat = count_true(some >= cuts[:, None]) > _FLAT * some.shape[1]
        flat, steep = is_flat.nonzero()[0], (~is_flat).nonzero()[0]
        found = [
            padded(len(rows), part[of_row], logits, tokens)
            for part, (of_row, logits, tokens) in (
                (flat, self._noisy(rows[flat], keys[flat], limits[flat], cuts[flat])),
                (steep, self._found_noisy(rows[steep], keys[steep], limits[steep], cuts[steep])),
                (steep, self._lucky(rows[steep], keys[steep], cuts[steep])),
            )
        ]
        return np.concatenate([x for x, _ in found], axis=1), np.concatenate([x for _, x in found], axis=1)

    def _noisy(
        self, rows: Int64Array, keys: UInt32Array, limits: UInt32Array, cuts: Float32Array
    ) -> tuple[Int64Array, Float32Array, Int64Array]:
        """As `_found`, of the tokens with hashes up to limits [n], and among them logits >= cuts [n] or lucky ids."""
        of_row, values, columns = [], [], []
        for i, row in enumerate(rows.tolist()):
            hashes = hash_rows(keys[i : i + 1], self._ids.all[None])[0]
            able = (hashes <= limits[i]).nonzero()[0]
            logits = self._rows[row, able]
            kept = (logits >= cuts[i]) | (hashes[able] < _LUCKY_HASHES)
            columns.append(able[kept])
            values.append(logits[kept])
            of_row.append(np.full(len(columns[-1]), i))
        if not of_row:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        return np.concatenate(of_row), np.concatenate(values), self._ids.of(np.concatenate(columns))

    def _found_noisy(
        self, rows: Int64Array, keys: UInt32Array, limits: UInt32Array, cuts: Float32Array
    ) -> tuple[Int64Array, Float32Array, Int64Array]:
        """As `_found` of logits >= cuts [n], but without the tokens whose hashes are above limits [n]."""
        of_row, values, ids = self._found(rows, cuts)
        able = (hash_rows(keys[of_row], ids[:, None])[:, 0] <= limits[of_row]).nonzero()[0]
        return of_row[able], values[able], ids[able]

    def _lucky(
        self, rows: Int64Array, keys: UInt32Array, cuts: Float32Array
    ) -> tuple[Int64Array, Float32Array, Int64Array]:
        """As `_found`, of the lucky ids with logits below cuts [n]."""
        of_row, ids = ids_with_hash_below(keys, _LUCKY_HASHES, self._ids.first, int(self._ids.all[-1]) + 1)
        here = self._ids.are_here(ids).nonzero()[0]
        of_row, ids = of_row[here], ids[here]
        values = self.logits(rows[of_row], ids)
        low = (values < cuts[of_row]).nonzero()[0]
        return of_row[low], values[low], ids[low]

    def _lower_bounds(self, rows: Int64Array, count: int) -> Float32Array:
        """[n]: values that at least `count` logits of each row reach, and not many more."""
        if count > self._size:
            return np.full(len(rows), -np.inf, dtype=np.float32)
        values = self._maxima[rows] if count <= self._maxima.shape[1] else self._some(rows)
        return np.partition(values, -count, axis=1)[:, -count]

    def _at_least(self, rows: Int64Array, bounds: Float32Array) -> tuple[Float32Array, Int64Array]:
        """Logits >= bounds [n] and their ids, [n, width] each, ids ascending; rows that have fewer are filled
        up with removed tokens that come after all others."""
        if self._size <= DENSE:
            found = (self._some(rows) >= bounds[:, None]).reshape(-1).nonzero()[0]
            of_row = found // self._size
            columns = found - of_row * self._size
            values = self._of_columns(rows[of_row], columns)
            return padded(len(rows), of_row, values, self._ids.of(columns))
        return padded(len(rows), *self._found(rows, bounds))

    def _found(self, rows: Int64Array, bounds: Float32Array) -> tuple[Int64Array, Float32Array, Int64Array]:
        """Of all logits >= bounds [n] the index into `rows`, the logit and the id, in order."""
        maxima = self._maxima[rows]
        of_row, block = np.divmod((maxima >= bounds[:, None]).reshape(-1).nonzero()[0], maxima.shape[1])
        row = rows[of_row]
        num_full, rest = divmod(self._size, _BLOCK)
        if rest == 0:
            logits = self._full_blocks[row, block]  # [num_blocks, _BLOCK]
        else:  # NaN behind the end of the last one
            logits = np.full((len(row), _BLOCK), np.nan, dtype=np.float32)
            full = block < num_full
            logits[full] = self._full_blocks[row[full], block[full]]
            logits[~full, :rest] = self._rows[row[~full], num_full * _BLOCK :]
        found = np.flatnonzero(logits >= bounds[of_row, None])
        in_block = found // _BLOCK
        first_columns = (block - np.arange(len(block))) * _BLOCK
        return of_row[in_block], logits.ravel()[found], self._ids.of(found + first_columns[in_block])
