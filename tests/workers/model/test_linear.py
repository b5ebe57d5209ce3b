import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from outrider.workers.model import linear, memory
from outrider.workers.model.linear import DenseLinear, PackedLinear, make_linear, packing_works

NO_BIAS = torch.empty(0)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 33])
@pytest.mark.parametrize(("features", "outputs"), [(24, 40), (65, 31), (256, 512), (800, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_gives_what_a_plain_product_gives(
    rows: int, features: int, outputs: int, dtype: torch.dtype
) -> None:
    if not packing_works(dtype):
        pytest.skip(f"no packed layout for {dtype} on this machine")
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outputs, features, generator=generator) / features**0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(rows, features, generator=generator).to(dtype)
    for b, exact_sums in itertools.product((bias, NO_BIAS), (True, False)):
        packed = make_linear(weight, b, packed=True, exact_sums=exact_sums)
        assert isinstance(packed, PackedLinear)
        want = F.linear(x, weight, b if b.numel() else None)
        # Sums of order 1 in another order: some 1e-6 in float32, one rounding (2^-8 of up to 4) in bfloat16.
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(packed(x), want, atol=tolerance, rtol=0)


def test_a_row_is_the_same_alone_and_padded() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    packed = make_linear(weight, NO_BIAS, packed=True)
    x = torch.randn(4, 32)
    torch.testing.assert_close(packed(x[:1]), packed(x)[:1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_few_numbers_of_rows_are_computed(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps code for each of them: with all of them a rank's memory grew for hours."""
    made: set[int] = set()

    def recorded(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, *others: Any) -> torch.Tensor:
            made.add(x.shape[0])
            return product(x, *others)

        return call

    product = make_linear(torch.ones(8, 16, dtype=torch.bfloat16), NO_BIAS, packed)
    monkeypatch.setattr(linear, "_multiply", recorded(linear._multiply))
    monkeypatch.setattr(F, "linear", recorded(F.linear))
    for rows in range(1, 513):
        assert product(torch.ones(rows, 16, dtype=torch.bfloat16)).shape == (rows, 8)
    # All of one tree's, then those of prompts, then those of many texts.
    assert made == {*range(4, 33)} | {*range(40, 257, 8)} | {*range(288, 513, 32)}


def test_the_sums_of_a_product_have_one_kind_of_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is kept for each number of rows: the first block is added to the bias, or to nothing, as the others
    are to the first."""
    random = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*size, generator=random) for size in ((40, 1200), (40,), (5, 1200)))
    product = make_linear(weight, bias, packed=True)
    without = make_linear(weight, NO_BIAS, packed=True)
    monkeypatch.setattr(linear, "_multiply", lambda *arguments: pytest.fail("two kinds of code"))
    torch.testing.assert_close(product(x), F.linear(x, weight, bias), atol=1e-4, rtol=0)
    torch.testing.assert_close(without(x), F.linear(x, weight), atol=1e-4, rtol=0)


def test_falls_back_where_packing_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "packing_works", lambda dtype: False)
    weight, x = torch.randn(6, 5), torch.randn(2, 5)
    plain = make_linear(weight, NO_BIAS, packed=True)
    assert isinstance(plain, DenseLinear)
    assert torch.equal(plain(x), F.linear(x, weight))


def test_huge_pages_are_asked_for_inside_the_range_only() -> None:
    assert not memory.collapse(4096, memory.HUGE_PAGE_BYTES)  # holds no whole aligned huge page
    values = torch.arange(3 * memory.HUGE_PAGE_BYTES // 4, dtype=torch.int32)
    memory.collapse(values.data_ptr(), values.nbytes)
    assert torch.equal(values, torch.arange(values.numel(), dtype=torch.int32))
