from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from outrider.workers.model.integer_linear import Int4Linear, Int8Linear, int8_works, make_integer_linear
from outrider.workers.model.linear import ProductKernels
from outrider.workers.model.quantized import make_scaled_linear
from outrider.workers.weights.integers import in_eight_bits, in_four_bits
from outrider.workers.weights.scaled import ScaledMatrix

NO_BIAS = torch.empty(0)


def weight_and_rows(outputs: int, features: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, features, generator=generator) / features**0.5
    x = torch.randn(rows, features, generator=generator)
    x[:, 3] *= 100  # an outlier, as activations have them
    return weight, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 33])
def test_eight_bits_give_the_product_with_the_dequantised_matrix(dtype: torch.dtype, rows: int) -> None:
    if not int8_works():
        pytest.skip("no exact int8 product on this machine")
    weight, x = weight_and_rows(40, 192, rows)
    matrix, bias = in_eight_bits(weight), torch.linspace(-1, 1, 40)
    x = x.to(dtype)
    product = make_integer_linear(matrix, bias.to(dtype), dtype, ProductKernels())
    assert isinstance(product, Int8Linear)
    got = product(x)
    want = x.double() @ matrix.dequantised(torch.float64).T + bias.to(dtype).double()
    assert got.dtype == dtype
    # Half a unit in the last place of bfloat16, and rows with an outlier of 200 rounded to 16 or to 24 bits.
    atol, rtol = (2e-2, 2**-8) if dtype == torch.bfloat16 else (1e-4, 0.0)
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=rtol)
    if dtype == torch.bfloat16:
        # Rounding rows is little beside rounding what comes out.
        assert (got.double() - want).abs().mean() < 1.1 * (want.bfloat16().double() - want).abs().mean()


@pytest.mark.parametrize("group", [32, 64])
def test_four_bits_give_the_product_with_the_dequantised_matrix(group: int) -> None:
    weight, x = weight_and_rows(40, 192, 5)
    matrix = in_four_bits(weight)
    if group == 64:
        assert matrix.shifts is not None
        matrix = ScaledMatrix(matrix.values, matrix.scales[:, ::2], 64, matrix.shifts[:, ::2].contiguous())
    x, bias = x.bfloat16(), torch.linspace(-1, 1, 40).bfloat16()
    product = make_integer_linear(matrix, bias, torch.bfloat16, ProductKernels())
    assert isinstance(product, Int4Linear)
    want = x.double() @ matrix.dequantised(torch.float64).T + bias.double()
    # The product and the sum with the bias are rounded to bfloat16.
    torch.testing.assert_close(product(x).double(), want, atol=2e-2, rtol=2**-7)


@pytest.mark.parametrize("rounded", [in_eight_bits, in_four_bits])
def test_a_row_is_the_same_bit_for_bit_among_any_others(rounded: Callable[[Tensor], ScaledMatrix]) -> None:
    weight, x = weight_and_rows(80, 256, 70)
    product = make_scaled_linear(rounded(weight), NO_BIAS, torch.bfloat16, packed=True)
    x = x.bfloat16()
    every = product(x)
    for rows in (1, 2, 3, 4, 7, 8, 33, 64):
        assert torch.equal(product(x[:rows]), every[:rows])
        assert torch.equal(product(x[5 : 5 + rows]), every[5 : 5 + rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_and_matrices_of_zeros(dtype: torch.dtype) -> None:
    for matrix in (in_eight_bits(torch.zeros(16, 64)), in_four_bits(torch.zeros(16, 64))):
        product = make_scaled_linear(matrix, NO_BIAS, dtype, packed=True)
        assert torch.equal(product(torch.zeros(3, 64, dtype=dtype)), torch.zeros(3, 16, dtype=dtype))


def test_what_has_no_fast_product_is_dequantised() -> None:
    weight, x = weight_and_rows(24, 48, 3)  # a last group of 16 columns
    matrix = in_four_bits(weight)
    assert make_integer_linear(matrix, NO_BIAS, torch.bfloat16, ProductKernels()) is None
    assert (
        make_integer_linear(in_four_bits(torch.zeros(8, 64)), NO_BIAS, torch.float32, ProductKernels())
        is None
    )
    got = make_scaled_linear(matrix, NO_BIAS, torch.float32, packed=True)(x)
    torch.testing.assert_close(got, x @ matrix.dequantised(torch.float32).T, atol=1e-4, rtol=0)


def test_rounding_is_to_the_nearest() -> None:
    weight, _ = weight_and_rows(24, 96, 1)
    eight, four = in_eight_bits(weight), in_four_bits(weight)
    for matrix, tolerance in ((eight, 0.501), (four, 0.55)):  # a centre of four bits is rounded to bfloat16
        steps = matrix.scales.repeat_interleave(matrix.group, dim=1)
        assert ((matrix.dequantised(torch.float32) - weight).abs() <= tolerance * steps).all()
