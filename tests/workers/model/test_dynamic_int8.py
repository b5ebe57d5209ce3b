"""Products in 8 bits, for drafters."""

import pytest
import torch

from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.model import draft_heads, integer_linear
from outrider.workers.model.draft_heads import served_head
from outrider.workers.model.dynamic_int8 import DynamicInt8Linear, dynamic_int8_works
from outrider.workers.model.head import LinearHead
from outrider.workers.model.linear import PackedLinear
from outrider.workers.model.quantized import make_scaled_linear
from outrider.workers.weights.scaled import ScaledMatrix

NO_BIAS = torch.empty(0)

pytestmark = pytest.mark.skipif(
    not dynamic_int8_works(), reason="this build of torch has no product in 8 bits"
)


def relative_errors(y: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (y.float() - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_row_is_near_whatever_its_size_and_that_of_others(
    num_rows: int, has_bias: bool, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(70, 96, generator=random) * torch.logspace(-3, 1, 70)[:, None]
    bias = torch.randn(70, generator=random) if has_bias else NO_BIAS
    x = (torch.randn(num_rows, 96, generator=random) * torch.logspace(-4, 4, num_rows)[:, None]).to(dtype)
    y = DynamicInt8Linear.rounding(weight, bias)(x)
    assert (y.dtype, y.shape) == (dtype, (num_rows, 70))
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    assert bool((relative_errors(y.double(), expected) < 0.05).all())


def test_rows_and_matrices_of_zeros_give_the_bias() -> None:
    bias = torch.arange(5.0)
    x = torch.zeros(3, 8)
    assert torch.equal(DynamicInt8Linear.rounding(torch.randn(5, 8), bias)(x), bias.expand(3, 5))
    assert torch.equal(DynamicInt8Linear.rounding(torch.zeros(5, 8), bias)(x + 1), bias.expand(3, 5))


def test_a_head_is_rounded_where_that_works_and_else_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lm_head = make_lm_head(LmHeadShape(64, 40, 64), torch.arange(40))
    in_int8 = served_head(lm_head, 100, packed=True, int8=True)
    assert isinstance(in_int8, LinearHead)
    assert isinstance(in_int8.linear, DynamicInt8Linear)
    monkeypatch.setattr(draft_heads, "dynamic_int8_works", lambda: False)
    kept = served_head(lm_head, 100, packed=True, int8=True)
    assert isinstance(kept, LinearHead)
    assert isinstance(kept.linear, PackedLinear)


def test_a_drafter_multiplies_its_8_bits_so_where_there_is_no_exact_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A target never does."""
    monkeypatch.setattr(integer_linear, "int8_works", lambda: False)
    random = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (40, 96), dtype=torch.int8, generator=random)
    matrix = ScaledMatrix(values, torch.rand(40, 1, generator=random), 96)
    x = torch.randn(5, 96, generator=random)
    drafts, exact = (
        make_scaled_linear(matrix, NO_BIAS, torch.float32, packed=True, only_drafts=only)
        for only in (True, False)
    )
    assert isinstance(drafts, DynamicInt8Linear)
    assert not isinstance(exact, DynamicInt8Linear)
    expected = x @ matrix.dequantised(torch.float32).T
    assert bool((relative_errors(drafts(x), expected) < 0.05).all())
    assert bool((relative_errors(exact(x), expected) < 1e-5).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_harms_no_other(bad: float) -> None:
    random = torch.Generator().manual_seed(0)
    product = DynamicInt8Linear.rounding(torch.randn(8, 16, generator=random), NO_BIAS)
    x = torch.randn(3, 16, generator=random)
    alone = product(x[[0, 2]])
    x[1, 2] = bad
    y = product(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], alone)
