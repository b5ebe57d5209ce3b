"""Flat arrays that hold one segment per sequence, back to back: which sequence, and where in its segment."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
AnyType = TypeVar("AnyType", bound=np.generic)


def starts_of(counts: Int64Array) -> Int64Array:
    """Where each segment begins, int64 [B], given the lengths of all, int64 [B]."""
    return counts.cumsum() - counts


def pick(values: npt.NDArray[AnyType], columns: Int64Array) -> npt.NDArray[AnyType]:
    """[B, M]: values[b, columns[b, j]] of every row b; as `np.take_along_axis`, at a third of its cost."""
    starts = np.arange(0, values.size, max(1, values.shape[1]))
    return values.reshape(-1)[columns + starts[:, None]]


def places_in(counts: Int64Array) -> Int64Array:
    """Of every element its index within its segment, int64 [sum of counts]: counts 2 and 3 give 0 1 0 1 2."""
    starts = starts_of(counts).repeat(counts)
    return np.arange(len(starts)) - starts
