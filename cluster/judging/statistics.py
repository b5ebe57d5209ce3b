"""Intervals of fractions and of differences between fractions of the same tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def fraction(successes: Sequence[bool]) -> Interval:
    """Of successes among all of at least one: Wilson's interval (1927)."""
    found = binomtest(sum(successes), len(successes)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(sum(successes) / len(successes), float(found.low), float(found.high))


def paired_difference(one: Sequence[bool], other: Sequence[bool]) -> Interval:
    """How much larger the fraction of `one` is than that of `other`, on the same tasks.

    Newcombe's square-and-add interval for paired proportions (Statistics in Medicine 17, 1998, method 10): made of
    both Wilson intervals and of how much the two agree, with the correction of that for continuity.
    """
    assert len(one) == len(other) > 0
    both = sum(a and b for a, b in zip(one, other, strict=True))
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    neither = len(one) - both - only_one - only_other
    first, second = fraction(one), fraction(other)
    margins = (both + only_one) * (only_other + neither) * (both + only_other) * (only_one + neither)
    product = float(both * neither - only_one * only_other)
    if product > 0:
        product = max(product - len(one) / 2, 0.0)
    agreement = product / math.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * agreement * a * b + b * b))

    value = (only_one - only_other) / len(one)
    low = value - reach(first.value - first.low, second.high - second.value)
    high = value + reach(second.value - second.low, first.high - first.value)
    return Interval(value, low, high)


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """The exact two-sided p-value of the two being equally often right on the same tasks."""
    differing = [a for a, b in zip(one, other, strict=True) if a != b]
    return float(binomtest(sum(differing), len(differing)).pvalue) if differing else 1.0
