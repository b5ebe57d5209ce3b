"""Products of rows as convolutions, by oneDNN's fast code alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from outrider.workers.model import convolved_linear
from outrider.workers.model.convolved_linear import (
    ROWS,
    ConvolvedLinear,
    convolutions_are_faster,
    convolutions_work,
)
from outrider.workers.model.linear import DenseLinear, PackedLinear, make_linear, pad_rows, row_step

NO_BIAS = torch.empty(0)

needs_convolutions = pytest.mark.skipif(
    not convolutions_are_faster(), reason="a processor with AVX2 alone multiplies so"
)


def matrix(outputs: int, columns: int) -> torch.Tensor:
    return torch.randn(outputs, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5


@needs_convolutions
@pytest.mark.parametrize(
    ("outputs", "columns"),
    [(96, 64), (40, 24), (31, 65), (577, 290), (96, 1200), (33, 2051)],
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_gives_what_a_plain_product_gives(outputs: int, columns: int, has_bias: bool) -> None:
    weight, bias = matrix(outputs, columns), torch.randn(outputs) if has_bias else NO_BIAS
    product = ConvolvedLinear(weight, bias, 1008)
    for rows in (0, 1, 3, 4, 7, 8, 33, 64, 65, 200):
        x = torch.randn(rows, columns)
        want = F.linear(x, weight, bias if has_bias else None)
        torch.testing.assert_close(product(x), want, atol=1e-5, rtol=0)


@needs_convolutions
def test_rows_may_be_every_second_one_or_columns_of_others() -> None:
    weight = matrix(48, 32)
    product, x = ConvolvedLinear(weight, NO_BIAS, 1024), torch.randn(16, 80)
    for part in (x[::2, :32], x[:, 40:72]):
        torch.testing.assert_close(product(part), F.linear(part, weight), atol=1e-5, rtol=0)


@needs_convolutions
@pytest.mark.parametrize("columns", [64, 1200])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(columns: int) -> None:
    product, x = ConvolvedLinear(matrix(96, columns), NO_BIAS, 1024), torch.randn(70, columns)
    whole = product(x)
    for rows in range(1, 70):
        assert torch.equal(product(x[:rows]), whole[:rows])


@needs_convolutions
def test_few_numbers_of_rows_are_computed_and_no_slow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN wants another layout for 12 rows it would take plain loops for them."""
    served = {*convolved_linear._served_rows(104, 72, torch.get_num_threads())}
    convolved_linear._served_rows.cache_clear()
    bytes_of = convolved_linear._bytes_of
    lay_out = convolved_linear._laid_out
    laid: list[int] = []

    def laid_out(weight: torch.Tensor, rows: int) -> torch.Tensor:
        laid.append(rows)
        return lay_out(weight, rows)

    monkeypatch.setattr(convolved_linear, "_laid_out", laid_out)
    monkeypatch.setattr(
        convolved_linear, "_bytes_of", lambda block: bytes_of(block) + bytes([laid[-1] == 12])
    )
    product = ConvolvedLinear(matrix(104, 72), NO_BIAS, 1024)
    made: set[int] = set()
    convolve = convolved_linear._convolve

    def recorded(x: torch.Tensor, *others: Any) -> torch.Tensor:
        made.add(x.shape[0])
        return convolve(x, *others)

    monkeypatch.setattr(convolved_linear, "_convolve", recorded)
    for rows in range(1, 300):
        assert product(torch.ones(rows, 72)).shape == (rows, 104)
    assert made == served - {12}
    convolved_linear._served_rows.cache_clear()


@needs_convolutions
def test_large_matrices_in_float32_are_convolutions_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    def capable(of: str) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: of)
        convolved_linear.convolutions_are_faster.cache_clear()

    large = torch.zeros(1000, 400)
    try:
        capable("AVX2")
        assert isinstance(make_linear(large, NO_BIAS, packed=True), ConvolvedLinear)
        assert isinstance(make_linear(large[:900], NO_BIAS, packed=True), PackedLinear)
        assert not isinstance(make_linear(large.bfloat16(), NO_BIAS, packed=True), ConvolvedLinear)
        assert isinstance(make_linear(large, NO_BIAS, packed=False), DenseLinear)
        # All rows of a model are padded once, for what convolutions have code for.
        assert (row_step(torch.float32), row_step(torch.bfloat16)) == (4, 1)
        assert [len(pad_rows(torch.zeros(rows, 2))) for rows in (1, 4, 5, 29, 33)] == [4, 4, 8, 32, 40]
        capable("AVX512")
        assert isinstance(make_linear(large, NO_BIAS, packed=True), PackedLinear)
        assert row_step(torch.float32) == 1
        assert [len(pad_rows(torch.zeros(rows, 2))) for rows in (1, 5, 29, 33)] == [4, 5, 29, 40]
    finally:
        convolved_linear.convolutions_are_faster.cache_clear()


def test_what_a_build_of_torch_lacks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> torch.Tensor:
        raise NotImplementedError("no such operator")

    assert not _works_with(monkeypatch, "_laid_out", missing)
    assert not _works_with(monkeypatch, "_convolve", lambda x, *others: torch.zeros(8, 96))
    assert not _works_with(monkeypatch, "_served_rows", lambda *sizes: ROWS[:-1])


def _works_with(monkeypatch: pytest.MonkeyPatch, name: str, other: Callable[..., Any]) -> bool:
    with monkeypatch.context() as patched:
        patched.setattr(convolved_linear, name, other)
        return convolutions_work()
