"""Arguments that disagree are named."""

import re

import pytest
import torch

from outrider.kernels.shapes import check_shapes

ROWS = torch.zeros(4)


def checked(*shapes: tuple[int, ...]) -> None:
    q, k, rows = (torch.zeros(shape) for shape in shapes)
    check_shapes((("q", q, ("N", "H", "D")), ("k", k, ("N", 3, "D")), ("rows", rows, ("N",))))


def test_what_agrees_passes() -> None:
    checked((4, 9, 64), (4, 3, 64), (4,))
    checked((0, 0, 0), (0, 3, 0), (0,))
    check_shapes((("rows", ROWS, ("N",)),))
    check_shapes((("rows", ROWS, (4,)),))
    check_shapes((("number", torch.zeros(()), ()),))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 9, 64), (4, 3, 16), (4,)), "k must be [N, 3, D], got [4, 3, 16]; D is 64 in q"),
        (((4, 9, 64), (4, 2, 64), (4,)), "k must be [N, 3, D], got [4, 2, 64]; 2 where 3 must be"),
        (((4, 9, 64), (4, 3, 64), (5,)), "rows must be [N], got [5]; N is 4 in q"),
        (((4, 9), (64, 4, 3), (64, 4)), "q must be [N, H, D], got [4, 9]; 3 dimensions are needed"),
        (((4, 9, 64), (4, 3, 64, 4), ()), "k must be [N, 3, D], got [4, 3, 64, 4]; 3 dimensions are needed"),
    ],
)
def test_what_does_not_is_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(*shapes)
    with pytest.raises(ValueError, match=re.escape("rows must be [5], got [4]; 4 where 5 must be")):
        check_shapes((("rows", ROWS, (5,)),))
