"""Intervals against figures from the papers they are from."""

import pytest

from outrider.cluster.judging.statistics import fraction, mcnemar, paired_difference


def pairs(both: int, one: int, other: int, neither: int) -> tuple[list[bool], list[bool]]:
    counts = ((both, True, True), (one, True, False), (other, False, True), (neither, False, False))
    rows = [(a, b) for count, a, b in counts for _ in range(count)]
    return [a for a, _ in rows], [b for _, b in rows]


def test_wilson_s_interval() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I: 81 of 263 and 0 of 20.
    found = fraction([True] * 81 + [False] * 182)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    none = fraction([False] * 20)
    assert (none.low, none.high) == (0.0, pytest.approx(0.1611, abs=1e-4))


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 2635), table III, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((36, 14, 0, 0), 0.1528, 0.4167),
        ((98, 0, 0, 0), -0.0377, 0.0377),
    ],
)
def test_newcombe_s_interval_of_a_paired_difference(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    found = paired_difference(*pairs(*counts))
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_the_difference_turns_its_sign_with_its_sides() -> None:
    one, other = pairs(40, 9, 3, 48)
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert there.value == -back.value == pytest.approx(0.06)
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


def test_pairs_tell_more_than_two_samples() -> None:
    agreeing = paired_difference(*pairs(50, 3, 1, 46))
    independent = paired_difference(*pairs(27, 26, 24, 23))
    assert agreeing.high - agreeing.low < 0.5 * (independent.high - independent.low)


def test_mcnemar_s_p() -> None:
    assert mcnemar(*pairs(10, 5, 5, 10)) == 1.0
    assert mcnemar(*pairs(10, 0, 0, 10)) == 1.0
    assert mcnemar(*pairs(10, 6, 0, 10)) == pytest.approx(2 / 64)
