"""Counter-based Gumbel noise: a pure function of (seed, position, token id).

The seed and the position are mixed into two 32-bit keys (the finaliser of splitmix64, Steele et al. 2014,
"Fast splittable pseudorandom number generators"); the id goes through two rounds of `lowbias32` (Wellons,
"Prospecting for hash functions"), each keyed by one of them. A round is a bijection of the 32-bit integers,
which the sampler uses to find, without hashing the vocabulary, the ids whose noise is large.

Everything up to the uniforms is integer arithmetic or exactly rounded float32, so any device can reproduce
it bit by bit. The two logarithms are taken in float64 and rounded once.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

UInt32Array = npt.NDArray[np.uint32]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Key = tuple[int, int]  # two 32-bit integers

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_INVERSE_1, _INVERSE_2 = np.uint32(0x1D69E2A5), np.uint32(0x43021123)  # modulo 2^32
_S15, _S16, _S30 = np.uint32(15), np.uint32(16), np.uint32(30)


def noise_key(seed: int, position: int) -> Key:
    """Key of the token at index `position` of a sequence (prompt included) under a 64-bit `seed`."""
    z = (seed + _GOLDEN * (position + 1)) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32


def noise_keys(seeds: npt.NDArray[np.uint64], positions: Int64Array) -> UInt32Array:
    """[n, 2]: `noise_key` of each seed and position."""
    z = positions.astype(np.uint64)
    z += np.uint64(1)
    z *= np.uint64(_GOLDEN)
    z += seeds
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    keys = np.empty((len(z), 2), dtype=np.uint32)
    keys[:, 0] = z  # its low half
    keys[:, 1] = z >> np.uint64(32)
    return keys


def hash_ids(key: Key, ids: npt.NDArray[np.integer]) -> UInt32Array:
    """Uniform 32-bit integers for token ids; different ids have different values."""
    return hash_rows(np.array([key], dtype=np.uint32), ids.reshape(1, -1)).reshape(ids.shape)


def hash_rows(keys: UInt32Array, ids: npt.NDArray[np.integer]) -> UInt32Array:
    """[num_rows, n]: the hashes of each row's ids, [num_rows, n] or [1, n], under its key, [num_rows, 2]."""
    x = ids.astype(np.uint32) ^ keys[:, :1]
    _lowbias32(x)
    x ^= keys[:, 1:]
    _lowbias32(x)
    return x


def ids_with_hash_below(keys: UInt32Array, bound: int, first: int, end: int) -> tuple[Int64Array, Int64Array]:
    """Rows and ids, [n] each in order of the rows: the ids in [first, end) whose hash under the row's key,
    [num_rows, 2], is less than `bound`.

    Inverts the hash of 0 … bound - 1, so the work depends on `bound` and not on the number of ids.
    """
    x = _once_inverted(bound) ^ keys[:, 1:]
    _lowbias32_inverse(x)
    x ^= keys[:, :1]
    x -= np.uint32(first)  # ids before `first` wrap around to large values
    # One-dimensional: over two axes numpy takes many times as long.
    found = (x < np.uint32(end - first)).reshape(-1).nonzero()[0]
    return found // bound, x.reshape(-1)[found].astype(np.int64) + first


def uniform_from_hash(h: UInt32Array) -> Float32Array:
    """(h + 1/2) / 2^32 in float32, clamped to [2^-33, 1 - 2^-24]."""
    v = h.astype(np.float32)
    v += np.float32(0.5)
    v *= np.float32(2.0**-32)
    return np.minimum(v, np.float32(1 - 2.0**-24), out=v)


def gumbel_from_hash(h: UInt32Array) -> Float32Array:
    """-log(-log(1 - v)) of the uniforms v: non-increasing in h, from 22.87 down to -2.81.

    Large values come from small v, where float32 is finest: the upper tail is the one that matters.
    """
    v = uniform_from_hash(h).astype(np.float64)
    return (-np.log(-np.log1p(-v))).astype(np.float32)


def gumbel(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise float32 of the shape of `ids` (int64 token ids)."""
    return torch.from_numpy(gumbel_from_hash(hash_ids(noise_key(seed, position), ids.numpy())))


def _lowbias32(x: UInt32Array) -> None:
    x ^= x >> _S16
    x *= _MULTIPLIER_1
    x ^= x >> _S15
    x *= _MULTIPLIER_2
    x ^= x >> _S16


def _lowbias32_inverse(x: UInt32Array) -> None:
    x ^= x >> _S16
    x *= _INVERSE_2
    x ^= (x >> _S15) ^ (x >> _S30)
    x *= _INVERSE_1
    x ^= x >> _S16


@cache
def _once_inverted(bound: int) -> UInt32Array:
    """The last round inverted for 0 … bound - 1: the same for every key."""
    x = np.arange(bound, dtype=np.uint32)
    _lowbias32_inverse(x)
    x.flags.writeable = False
    return x
