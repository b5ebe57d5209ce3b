"""The norm between layers: against float64, and against torch's own where that is what runs."""

import pytest
import torch
import torch.nn.functional as F

from outrider.kernels.rms_norm import rms_norm

EPS = 1e-5


@pytest.mark.parametrize("shape", [(1, 576), (4, 576), (33, 64), (5, 3, 16), (0, 8)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_it_is_as_close_to_float64_as_torchs(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = scale * torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)
    before = x.clone()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    with torch.inference_mode():
        own, other = rms_norm(x, weight, EPS), F.rms_norm(x, weight.shape, weight, EPS)
    assert own.dtype == torch.float32
    assert own.shape == x.shape
    assert torch.equal(x, before)
    if x.numel():
        assert (own - exact).abs().max() <= 2.0 * (other - exact).abs().max() + 1e-7


def test_a_row_of_zeros_stays_one() -> None:
    with torch.inference_mode():
        assert not rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).any()


def test_in_other_dtypes_and_where_gradients_are_wanted_it_is_torchs() -> None:
    x, weight = torch.randn(3, 16), torch.randn(16, requires_grad=True)
    x.requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    with torch.inference_mode():
        narrow, of_narrow = x.bfloat16(), weight.bfloat16()
        assert torch.equal(rms_norm(narrow, of_narrow, EPS), F.rms_norm(narrow, (16,), of_narrow, EPS))
