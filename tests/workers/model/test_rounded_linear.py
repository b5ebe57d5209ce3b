"""Products in 8 bits, for drafters."""

import pytest
import torch

from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.model import draft_heads
from outrider.workers.model.draft_heads import served_head
from outrider.workers.model.head import LinearHead
from outrider.workers.model.linear import PackedLinear
from outrider.workers.model.rounded_linear import RoundedLinear, rounding_works

NO_BIAS = torch.empty(0)

pytestmark = pytest.mark.skipif(not rounding_works(), reason="this build of torch has no product in 8 bits")


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
    y = RoundedLinear(weight, bias)(x)
    assert (y.dtype, y.shape) == (dtype, (num_rows, 70))
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    assert bool((relative_errors(y.double(), expected) < 0.05).all())


def test_rows_and_matrices_of_zeros_give_the_bias() -> None:
    bias = torch.arange(5.0)
    x = torch.zeros(3, 8)
    assert torch.equal(RoundedLinear(torch.randn(5, 8), bias)(x), bias.expand(3, 5))
    assert torch.equal(RoundedLinear(torch.zeros(5, 8), bias)(x + 1), bias.expand(3, 5))


def test_a_head_is_rounded_where_that_works_and_else_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lm_head = make_lm_head(LmHeadShape(64, 40, 64), torch.arange(40))
    rounded = served_head(lm_head, 100, packed=True, rounded=True)
    assert isinstance(rounded, LinearHead)
    assert isinstance(rounded.linear, RoundedLinear)
    monkeypatch.setattr(draft_heads, "rounding_works", lambda: False)
    kept = served_head(lm_head, 100, packed=True, rounded=True)
    assert isinstance(kept, LinearHead)
    assert isinstance(kept.linear, PackedLinear)
