"""Reductions that sampling makes over one rank's shard of the vocabulary. This is the CPU path.

The token of a row is the argmax of logit / temperature + Gumbel(key, id), ties to the smaller id. Only tokens
that can still win are looked at, which changes the cost and never the result:

- The maximum of every block of 128 logits is taken once; the blocks that hold the likeliest tokens follow.
- Noise above `_LUCKY_GUMBEL` goes to few ids, and inverting the hash lists them. Every other token must come
  within that distance of the best score known so far, or it has lost.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import (
    Float32Array,
    Int64Array,
    Key,
    gumbel_from_hash,
    hash_ids,
    ids_with_hash_below,
)
from outrider.kernels.operators import sample_shard_op
from outrider.kernels.shapes import check_kernel_arguments, check_shapes

UInt64Array = npt.NDArray[np.uint64]

_BLOCK = 128  # logits per block maximum
_LUCKY_HASHES = 2**14  # hashes below this are found by inverting; one id in 2^18 has one
_LUCKY_GUMBEL = 12.48  # upper bound of the noise of all other ids: -log(-log(1 - 2^-18)) = 12.4766
_FIRST_BLOCKS = 32  # likeliest blocks that give the first bound on the best score
_ROUNDING = 1e-3  # slack of the bounds, many times the rounding of the noise
_RELATIVE_ROUNDING = 1e-6  # and of scores: at low temperatures they are large


class ShardSample(NamedTuple):
    """The best token of each row within a shard."""

    values: torch.Tensor  # float32 [num_rows]: logit / temperature + noise; the logit at temperature 0
    ids: torch.Tensor  # int64 [num_rows]: ids of the whole vocabulary
    maxima: torch.Tensor  # float32 [num_rows]: the largest logit / temperature; temperature 0 counts as 1
    exp_sums: torch.Tensor  # float64 [num_rows]: sum over the shard of exp(logit / temperature - maximum)


def sample_shard(
    logits: torch.Tensor,
    temperatures: list[float],
    keys: list[Key],
    vocab_offset: int,
    use_kernel: bool = False,
) -> ShardSample:
    """Sample each row of a shard; see the module's docstring.

    Args:
        logits: float32 [num_rows, shard_size], processed; -inf removes a token.
        temperatures: one per row; 0 takes the largest logit without noise.
        keys: `noise_key` of each row's seed and position.
        vocab_offset: token id of column 0.
        use_kernel: run `sample_shard.cu` (logits on a GPU); the result is on that GPU.

    Raises:
        ValueError: there are not as many temperatures and keys as rows.
    """
    for name, values in (("temperatures", temperatures), ("keys", keys)):
        if len(values) != logits.shape[0]:
            raise ValueError(f"{name} has {len(values)} entries, logits has {logits.shape[0]} rows")
    if not use_kernel:
        return sample_shard_by_reference(logits, temperatures, keys, vocab_offset)
    check_shapes((("logits", logits, ("num_rows", "shard_size")),))
    check_kernel_arguments((("logits", logits, torch.float32),))
    scores, tokens, largest, sums = sample_shard_op(
        logits,
        torch.tensor(temperatures, dtype=torch.float32, device=logits.device),
        torch.tensor(keys, dtype=torch.int64, device=logits.device).view(-1, 2),
        vocab_offset,
    )
    return ShardSample(scores, tokens, largest, sums.double())


def sample_shard_by_reference(
    logits: torch.Tensor, temperatures: list[float], keys: list[Key], vocab_offset: int
) -> ShardSample:
    """The CPU path; arguments as in `sample_shard`."""
    shard = ShardLogits(logits, vocab_offset)
    rows = range(len(temperatures))
    best = np.concatenate([shard.best(i, temperatures[i], keys[i], 1) for i in rows])
    values, ids = unpack_tokens(best)
    divisors = [temperature or 1.0 for temperature in temperatures]
    return ShardSample(
        torch.from_numpy(values),
        torch.from_numpy(ids),
        torch.from_numpy(np.array([shard.maximum(i) / divisors[i] for i in rows], dtype=np.float32)),
        torch.from_numpy(np.array([shard.exp_sum(i, divisors[i]) for i in rows], dtype=np.float64)),
    )


class ShardLogits:
    """Logits of several rows over one shard of the vocabulary, with the reductions sampling needs.

    The memory of `logits` (float32 [num_rows, shard_size], contiguous, on the CPU) is shared and must not
    change while this object is in use.
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
        num_full = self._size // _BLOCK
        full = self._logits[:, : num_full * _BLOCK].unflatten(1, (num_full, _BLOCK)).amax(-1)
        if self._size == num_full * _BLOCK:
            return full.numpy()
        rest = self._logits[:, num_full * _BLOCK :].amax(-1, keepdim=True)
        return torch.cat([full, rest], dim=1).numpy()

    def logits(self, row: int | Int64Array, ids: Int64Array) -> Float32Array:
        """Logits float32 [num_ids] of tokens of this shard; of one row, or of a row for each id."""
        return self._rows[row, ids - self.vocab_offset]

    def has(self, token: int) -> bool:
        """Whether a token id is in this shard."""
        return self.vocab_offset <= token < self.vocab_offset + self._size

    def maximum(self, row: int) -> float:
        return float(self._maxima[row].max())

    def exp_sum(self, row: int, temperature: float) -> float:
        """Sum over the shard of exp((logit - maximum of the shard) / temperature)."""
        maximum = self._maxima[row].max()
        if maximum == -np.inf:
            return 0.0
        x = self._rows[row] - maximum
        if temperature != 1.0:
            x *= np.float32(1.0 / temperature)
        return float(np.exp(x, out=x).sum(dtype=np.float64))

    def top(self, row: int, count: int) -> UInt64Array:
        """Packed tokens of the `count` largest logits (of all, if there are fewer), largest first."""
        logits, columns = self._at_least(row, self._lower_bound(row, count))
        return first_packed(pack_tokens(logits, columns + self.vocab_offset), count)

    def best(self, row: int, temperature: float, key: Key, count: int) -> UInt64Array:
        """Packed tokens of the `count` best scores logit / temperature + noise, best first.

        Temperature 0 ranks by the logits alone.
        """
        if temperature == 0.0:
            if count > 1:
                return self.top(row, count)
            column = int(self._rows[row].argmax())  # the first of equals
            return pack_tokens(self._rows[row, column : column + 1], np.array([column + self.vocab_offset]))
        bound = self._score_bound(row, temperature, key, count)
        bound -= _ROUNDING + _RELATIVE_ROUNDING * abs(bound)
        # Tokens below `cut` would need more noise than any but the lucky ids have.
        cut = (bound - _LUCKY_GUMBEL) * temperature
        logits, columns = self._at_least(row, cut)
        ids = columns + self.vocab_offset
        hashes = hash_ids(key, ids)
        possible = hashes <= _largest_hash(bound - self.maximum(row) / temperature)
        scores = logits[possible] / np.float32(temperature) + gumbel_from_hash(hashes[possible])
        end = self.vocab_offset + self._size
        lucky = ids_with_hash_below(key, _LUCKY_HASHES, self.vocab_offset, end)
        lucky_logits = self.logits(row, lucky)
        lucky, lucky_logits = lucky[lucky_logits < cut], lucky_logits[lucky_logits < cut]
        scores = np.concatenate([scores, perturb(lucky_logits, lucky, temperature, key)])
        return first_packed(pack_tokens(scores, np.concatenate([ids[possible], lucky])), count)

    def _score_bound(self, row: int, temperature: float, key: Key, count: int) -> float:
        """A score that at least `count` tokens of the row reach: the count-th best of the likeliest ones."""
        logits, columns = self._at_least(row, self._lower_bound(row, max(count, _FIRST_BLOCKS)))
        if len(columns) < count:
            return -np.inf
        scores = perturb(logits, columns + self.vocab_offset, temperature, key)
        return float(np.partition(scores, -count)[-count])

    def _lower_bound(self, row: int, count: int) -> float:
        """A value that at least `count` logits of the row reach, and not many more."""
        maxima = self._maxima[row]
        if count <= len(maxima):
            return float(np.partition(maxima, -count)[-count])
        if count < self._size:
            return float(np.partition(self._rows[row], -count)[-count])
        return -np.inf

    def _at_least(self, row: int, bound: float) -> tuple[Float32Array, Int64Array]:
        """Logits >= bound and their columns in ascending order."""
        logits = self._rows[row]
        blocks = np.flatnonzero(self._maxima[row] >= bound)
        if 2 * len(blocks) > self._maxima.shape[1]:
            columns = np.flatnonzero(logits >= bound)
            return logits[columns], columns
        columns = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
        columns = columns[: np.searchsorted(columns, self._size)]  # the last block may be short
        values = logits[columns]
        keep = values >= bound
        return values[keep], columns[keep]


def perturb(logits: Float32Array, ids: Int64Array, temperature: float, key: Key) -> Float32Array:
    """The scores float32 that sampling compares: logit / temperature + noise."""
    return logits / np.float32(temperature) + gumbel_from_hash(hash_ids(key, ids))


def pack_tokens(values: Float32Array, ids: Int64Array) -> UInt64Array:
    """(value, id) pairs as integers that sort by falling value, then by rising id."""
    bits = (values + np.float32(0.0)).view(np.uint32)  # -0.0 becomes 0.0
    falling = np.where(bits >> np.uint32(31), bits, ~bits & np.uint32(0x7FFFFFFF))
    return (falling.astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)


def unpack_tokens(packed: UInt64Array) -> tuple[Float32Array, Int64Array]:
    """Values and ids of packed tokens."""
    falling = (packed >> np.uint64(32)).astype(np.uint32)
    bits = np.where(falling >> np.uint32(31), falling, ~falling & np.uint32(0x7FFFFFFF))
    return bits.view(np.float32), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def first_packed(packed: UInt64Array, count: int) -> UInt64Array:
    """The `count` first packed tokens (all, if there are fewer) in order."""
    if count < len(packed):
        packed = np.partition(packed, count - 1)[:count]
    return np.sort(packed)


def _largest_hash(gumbel: float) -> np.uint32:
    """No hash above this has noise of `gumbel` or more."""
    if not gumbel > 0.0:  # NaN where every token is removed
        return np.uint32(2**32 - 1)  # where hashes are large, float32 uniforms are too coarse to tell
    return np.uint32(int(-np.expm1(-np.exp(-gumbel)) * 2**32) + 1)
