"""Tokens of several rows at once, as the sampler compares them: packed with their values, ranked, left out.

A packed token is a (value, id) pair as an integer; packed tokens sort by falling value, then by rising id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outrider.kernels.noise import (
    Float32Array,
    Int64Array,
    UInt32Array,
    gumbel_from_hash,
    hash_rows,
    uniform_from_hash,
)

UInt64Array = npt.NDArray[np.uint64]

LOWEST = np.finfo(np.float32).min
"""The lowest logit that is not removed."""

REMOVED = np.uint64(0xFF800000 << 32)
"""Packed tokens from here on have value -inf."""
PART = 2**16
"""Elements worked on at once, so that they stay in the processor's cache."""
FEW = 8
"""Winners up to which looking for one after the other is cheaper than sorting."""

_PADDING = np.uint64(2**64 - 1)  # a packed token that comes after all others
_NO_ID = 2**32 - 1
_ID_BITS = np.uint64(2**32 - 1)
_ROUNDING = 1e-3  # slack of bounds on scores, many times the rounding of the noise
_RELATIVE_ROUNDING = 1e-6  # and of scores: at low temperatures they are large


def pack_tokens(values: Float32Array, ids: Int64Array) -> UInt64Array:
    """(value, id) pairs as integers that sort by falling value, then by rising id."""
    bits = (values + np.float32(0.0)).view(np.uint32)  # -0.0 becomes 0.0
    packed = _falling(bits).astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= ids.astype(np.uint64)
    return packed


def ids_of(packed: UInt64Array) -> Int64Array:
    """The ids of packed tokens."""
    return (packed & _ID_BITS).view(np.int64)


def with_ids(packed: UInt64Array, ids: Int64Array) -> UInt64Array:
    """Packed tokens with other ids."""
    return (packed & ~_ID_BITS) | ids.view(np.uint64)


def unpack_tokens(packed: UInt64Array) -> tuple[Float32Array, Int64Array]:
    """Values and ids of packed tokens."""
    bits = _falling((packed >> np.uint64(32)).astype(np.uint32))
    return bits.view(np.float32), ids_of(packed)


def _falling(bits: UInt32Array) -> UInt32Array:
    """The bits of float32 numbers as integers that fall as the numbers rise, and back again: positive numbers turn
    all bits but the sign, negative ones none."""
    turned = (bits >> np.uint32(31)) - np.uint32(1)  # all bits of positive numbers, none of negative ones
    turned &= np.uint32(0x7FFFFFFF)
    turned ^= bits
    return turned


def lower_by_rounding(bounds: Float32Array) -> None:
    """Lower bounds on scores by what the scores may be off, in place."""
    bounds -= _ROUNDING + _RELATIVE_ROUNDING * np.abs(bounds)


def best_of(
    values: Float32Array,
    ids: Int64Array,
    temperatures: Float32Array,
    keys: UInt32Array,
    count: int,
    all_ids: Int64Array,
) -> UInt64Array:
    """[n, count]: packed tokens of the best scores logit / temperature + noise of each row, in order.

    The noise -log(-log(1 - v)) is at most -log(v), one float32 logarithm; the two exact ones are taken where that
    bound reaches the best.

    Args:
        values: float32 [n, width], logits; -inf is removed.
        ids: int64 [n, width] or [1, width], distinct in a row.
        temperatures: float32 [n], > 0.
        keys: uint32 [n, 2].
        all_ids: int64 [shard_size], ascending, `count` at least: where fewer than `count` are left, removed tokens
            follow in this order.
    """
    num, width = values.shape
    hashes = hash_rows(keys, ids)
    scaled = values / temperatures[:, None]
    upper = scaled - np.log(uniform_from_hash(hashes))
    firsts = (np.arange(num) * width)[:, None]
    if count <= FEW:
        leading, leaders = leaders_of(upper, count)
    else:
        num_leaders = min(count, width)
        leaders = upper.argpartition(-num_leaders, axis=1)[:, -num_leaders:]
        leading = upper.reshape(-1)[firsts + leaders]
    leaders += firsts
    bounds = scaled.reshape(-1)[leaders]
    bounds += gumbel_from_hash(hashes.reshape(-1)[leaders])
    bounds = bounds.min(axis=1)
    lower_by_rounding(bounds)
    if width < count:
        bounds[:] = LOWEST  # fewer than `count` are left: all of them
    bounds[leading.min(axis=1) == -np.inf] = LOWEST
    found = (upper >= bounds[:, None]).reshape(-1).nonzero()[0]
    scores = scaled.reshape(-1)[found] + gumbel_from_hash(hashes.reshape(-1)[found])
    of_row = found // width
    packed = pack_tokens(scores, ids.reshape(-1)[found if len(ids) == num else found - of_row * width])
    columns, longest = _columns(num, of_row)
    ranked = np.full((num, max(count, longest)), _PADDING)
    ranked.reshape(-1)[of_row * ranked.shape[1] + columns] = packed
    if count == 1:
        return removed_by_id(ranked.min(axis=1, keepdims=True), all_ids)
    ranked.sort(axis=1)
    return removed_by_id(ranked[:, :count], all_ids)


def parts_of_rows(num_rows: int, width: int) -> list[slice]:
    """Rows of so many elements, a few at a time, so that what is worked on stays in the processor's cache."""
    step = max(1, PART // width)
    return [slice(first, first + step) for first in range(0, num_rows, step)]


def largest_hashes(noise: Float32Array) -> UInt32Array:
    """No hash above these has as much noise."""
    with np.errstate(over="ignore"):
        hashes = -np.expm1(-np.exp(-noise.astype(np.float64))) * 2.0**32 + 1
    # Where hashes are large, float32 uniforms are too coarse to tell; NaN where every token is removed.
    return np.where(noise > 0.0, hashes, 2.0**32 - 1).astype(np.uint32)


def exponentials(values: Float32Array, maxima: Float32Array, temperatures: Float32Array) -> Float32Array:
    """exp((value - maximum) / temperature): values [n, width], maxima and temperatures > 0 [n]."""
    x = values - maxima[:, None]
    if np.count_nonzero(temperatures != 1.0):
        x *= np.float32(1.0) / temperatures[:, None]
    return np.exp(x, out=x)


def removed_by_id(packed: UInt64Array, all_ids: Int64Array) -> UInt64Array:
    """Fill winners [n, count] up with removed tokens in the order of `all_ids`, where they ran out."""
    short = (packed[:, -1] >= REMOVED).nonzero()[0]
    if not len(short):
        return packed
    some, count = packed[short], packed.shape[1]
    left = some < REMOVED
    ids = all_ids[:count].astype(np.uint64)
    taken = ((some & np.uint64(0xFFFFFFFF))[:, :, None] == ids) & left[:, :, None]
    free = ids[np.argsort(taken.any(axis=1), axis=1, kind="stable")]
    at = np.maximum(np.arange(count) - count_true(left)[:, None], 0)
    packed[short] = np.where(left, some, REMOVED + np.take_along_axis(free, at, axis=1))
    return packed


def count_true(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Of each row, over the last axis; faster than counting booleans."""
    return np.add.reduce(mask.view(np.uint8), axis=-1, dtype=np.int32)


def leaders_of(values: Float32Array, count: int) -> tuple[Float32Array, Int64Array]:
    """Of each row the `count` largest values and their columns in order, the first of equals first.

    Where only -inf is left the columns repeat.
    """
    rest = values if count == 1 else values.copy()
    flat, firsts = rest.reshape(-1), np.arange(len(values)) * values.shape[1]
    largest = np.empty((len(values), count), dtype=np.float32)
    columns = np.empty((len(values), count), dtype=np.int64)
    for i in range(count):
        columns[:, i] = column = rest.argmax(axis=1)
        largest[:, i] = flat[firsts + column]
        if i + 1 < count:
            flat[firsts + column] = -np.inf
    return largest, columns


def drop_surplus(values: Float32Array, lowest: Float32Array, num_lowest: Int64Array) -> None:
    """Put -inf, in place, for all but the first `num_lowest` ([n]) of the values in a row that equal its `lowest`."""
    equal = values == lowest[:, None]
    crowded = (count_true(equal) > num_lowest).nonzero()[0]
    if len(crowded):
        late = equal[crowded]
        late &= late.cumsum(axis=1) > num_lowest[crowded, None]
        values[crowded] = np.where(late, np.float32(-np.inf), values[crowded])


def padded(
    num_rows: int, rows: Int64Array, values: Float32Array, ids: Int64Array
) -> tuple[Float32Array, Int64Array]:
    """Tokens, in order of their rows, as matrices filled up with removed tokens that no vocabulary has."""
    columns, width = _columns(num_rows, rows)
    padded = np.full((num_rows, max(1, width)), -np.inf, dtype=np.float32)
    padded_ids = np.full(padded.shape, _NO_ID)
    places = rows * padded.shape[1] + columns
    padded.reshape(-1)[places], padded_ids.reshape(-1)[places] = values, ids
    return padded, padded_ids


def _columns(num_rows: int, rows: Int64Array) -> tuple[Int64Array, int]:
    """Columns for entries that come in order of their rows, and how many columns the longest row needs."""
    counts = np.bincount(rows, minlength=num_rows)
    return np.arange(len(rows)) - (counts.cumsum() - counts)[rows], int(counts.max(initial=0))
