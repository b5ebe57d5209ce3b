"""Logits of one rank's shard of the vocabulary, with the reductions that sampling makes over it, on the CPU.

All rows go through each operation together. The exact noise is only computed for tokens that can still win, which
changes the cost and never the result: -log of its uniform bounds it from above. In a large vocabulary, where hashing
all ids would cost more than everything else, fewer tokens are looked at:

- The maximum of every block of 128 logits is taken once; the blocks that hold the likeliest tokens follow.
- Noise above `_LUCKY_GUMBEL` goes to few ids, and inverting the hash lists them. Every other token must come
  within that distance of the best score known so far, or it has lost.
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
from outrider.kernels.token_rows import (
    FEW,
    LOWEST,
    PART,
    UInt64Array,
    best_of,
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
_DENSE = 8192  # vocabulary up to which all ids are hashed
_LARGE_PART = 4  # rows of a large vocabulary worked on at once
_LUCKY_HASHES = 2**14  # hashes below this are found by inverting; one id in 2^18 has one
_LUCKY_GUMBEL = 12.48  # upper bound of the noise of all other ids: -log(-log(1 - 2^-18)) = 12.4766
_FIRST_BLOCKS = 32  # likeliest blocks that give the first bound on the best score


class ShardLogits:
    """Logits of several rows over one shard of the vocabulary, with the reductions sampling needs.

    The memory of `logits` (float32 [num_rows, shard_size], contiguous, on the CPU) is shared and must not
    change while this object is in use. Rows that hold NaN or +inf have a maximum and nothing else.
    """

    def __init__(self, logits: torch.Tensor, vocab_offset: int) -> None:
        assert logits.dtype == torch.float32
        assert logits.dim() == 2
        logits = logits.detach().contiguous()
        self.vocab_offset = vocab_offset
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
        return self._rows.reshape(-1)[rows * self._size + ids - self.vocab_offset]

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

    def weighted_sums(self, rows: Int64Array, maxima: Float32Array) -> npt.NDArray[np.float64]:
        """[n]: of each row the sum over the shard of x * exp(x) where x = logit - maximum, finite maxima given."""
        sums = np.empty(len(rows))
        for part in parts_of_rows(len(rows), self._size):
            x = self._some(rows[part]) - maxima[part, None]
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
                packed[part] = pack_tokens(values, columns + self.vocab_offset)
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
        greedy, noisy = (temperatures == 0.0).nonzero()[0], temperatures.nonzero()[0]
        if not len(noisy):
            return self._likeliest(rows) if count == 1 else self.top(rows, count)
        best = np.empty((len(rows), count), dtype=np.uint64)
        if len(greedy):
            best[greedy] = self._likeliest(rows[greedy]) if count == 1 else self.top(rows[greedy], count)
        for part in self._parts(len(noisy)):
            chosen = noisy[part]
            if self._size <= _DENSE:
                values, ids = self._some(rows[chosen]), self._all_ids[None]
            else:
                values, ids = self._possible(rows[chosen], temperatures[chosen], keys[chosen], count)
            best[chosen] = best_of(values, ids, temperatures[chosen], keys[chosen], count, self.vocab_offset)
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
            best[part] = best_of(values, ids, temperatures[part], keys[part], count, self.vocab_offset)
        return best

    @cached_property
    def _all_ids(self) -> Int64Array:
        return np.arange(self.vocab_offset, self.vocab_offset + self._size)

    def _some(self, rows: Int64Array) -> Float32Array:
        if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1:  # they ascend
            return self._rows[int(rows[0]) : int(rows[0]) + len(rows)]
        return self._rows[rows]

    def _parts(self, num_rows: int) -> list[slice]:
        return parts_of_rows(num_rows, PART // _LARGE_PART if self._size > _DENSE else self._size)

    def _likeliest(self, rows: Int64Array) -> UInt64Array:
        """[n, 1]: packed tokens of the largest logits, the first of equals."""
        if self._size <= _SMALL:
            values = self._some(rows)
            columns = values.argmax(axis=1)
            largest = values.reshape(-1)[np.arange(len(rows)) * self._size + columns]
            return pack_tokens(largest, columns + self.vocab_offset)[:, None]
        first = self._maxima[rows].argmax(axis=1)[:, None] * _BLOCK
        inside = np.minimum(first + np.arange(_BLOCK), self._size - 1)
        columns = np.take_along_axis(
            inside, self._rows[rows[:, None], inside].argmax(axis=1)[:, None], axis=1
        )[:, 0]
        return pack_tokens(self._rows[rows, columns], columns + self.vocab_offset)[:, None]

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
        of_row, values, ids = self._found(rows, cuts)
        limits = largest_hashes(bounds - self.maxima(rows) / temperatures)
        able = np.flatnonzero(hash_rows(keys[of_row], ids[:, None])[:, 0] <= limits[of_row])
        values, ids = padded(len(rows), of_row[able], values[able], ids[able])
        end = self.vocab_offset + self._size
        lucky_rows, lucky_ids = ids_with_hash_below(keys, _LUCKY_HASHES, self.vocab_offset, end)
        lucky = self.logits(rows[lucky_rows], lucky_ids)
        low = lucky < cuts[lucky_rows]
        more_values, more_ids = padded(len(rows), lucky_rows[low], lucky[low], lucky_ids[low])
        return np.concatenate([values, more_values], axis=1), np.concatenate([ids, more_ids], axis=1)

    def _lower_bounds(self, rows: Int64Array, count: int) -> Float32Array:
        """[n]: values that at least `count` logits of each row reach, and not many more."""
        for values in (self._maxima[rows], self._rows[rows]):
            if count <= values.shape[1]:
                return np.partition(values, -count, axis=1)[:, -count]
        return np.full(len(rows), -np.inf, dtype=np.float32)

    def _at_least(self, rows: Int64Array, bounds: Float32Array) -> tuple[Float32Array, Int64Array]:
        """Logits >= bounds [n] and their ids, [n, width] each, ids ascending; rows that have fewer are filled
        up with removed tokens that come after all others."""
        if self._size <= _DENSE:
            found = (self._some(rows) >= bounds[:, None]).reshape(-1).nonzero()[0]
            of_row = found // self._size
            columns = found - of_row * self._size
            return padded(
                len(rows),
                of_row,
                self.logits(rows[of_row], columns + self.vocab_offset),
                columns + self.vocab_offset,
            )
        return padded(len(rows), *self._found(rows, bounds))

    def _found(self, rows: Int64Array, bounds: Float32Array) -> tuple[Int64Array, Float32Array, Int64Array]:
        """Of all logits >= bounds [n] the index into `rows`, the logit and the id, in order."""
        of_row, block = np.nonzero(self._maxima[rows] >= bounds[:, None])
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
        first_ids = (block - np.arange(len(block))) * _BLOCK + self.vocab_offset
        return of_row[in_block], logits.ravel()[found], found + first_ids[in_block]
