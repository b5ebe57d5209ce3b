"""Products in 8 bits on both sides, for what only drafts: the matrix is rounded, and so is each row of the input.

On a CPU through FBGEMM's dynamically quantised product, which torch brings. A drafter's few rows are bound by reading
matrices, which are a quarter of their float32 size here, and it multiplies faster than float32 at any number of rows,
with AVX2 alone. An error of 2 % of each output costs a drafter next to nothing, see docs/drafters.md; a target must
not have it, and rows that differ by who else is in a batch neither: see `integer_linear` for that.
"""

import functools
import warnings
from typing import Self

import torch
from torch import Tensor

_LARGEST = 127  # of int8, with a scale for each row of the matrix
_TINY = 1e-30  # for rows of zeros


class DynamicInt8Linear:
    """y = x W^T + b, of float32 or bfloat16 rows.

    FBGEMM gives all rows of a call one scale. Here each row is brought to the same largest magnitude before, and its
    products back after: rows that read a text's first token are a hundred times larger than others.
    """

    pads = False

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor) -> None:
        """
        Args:
            values: int8 [out, in], and `scales`, float32 [out], by which its rows are multiplied.
            bias: [out], or no elements for none. All are on the CPU.
        """
        self.out_features, self.in_features = values.shape
        self._bias = bias.float() if bias.numel() else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch moves its tools for quantisation elsewhere
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            matrix = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(matrix, None)

    @classmethod
    def rounding(cls, weight: Tensor, bias: Tensor) -> Self:
        """Of a matrix [out, in] that is rounded here."""
        scales = weight.float().abs().amax(dim=1).clamp_min(_TINY) / _LARGEST
        return cls((weight.float() / scales[:, None]).round_().to(torch.int8), scales, bias)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.float()
        sizes = rows.abs().amax(dim=1, keepdim=True).clamp_min_(_TINY)
        # A row that is no number is zeros in the product, whose scale it would spoil, and no number again behind it.
        scaled = (rows / sizes).nan_to_num_(0.0)
        # Seven bits for the rows, since without VNNI sums of two products are cut off at 16 bits.
        y: Tensor = torch.ops.quantized.linear_dynamic(scaled, self._packed, True)
        y *= sizes
        if self._bias is not None:
            y += self._bias
        return y.to(x.dtype)


@functools.cache
def dynamic_int8_works() -> bool:
    """Whether this build of torch has the product, and it gives what it should."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, 64, generator=generator) for size in (32, 5))
    try:
        with torch.inference_mode():
            got = DynamicInt8Linear.rounding(weight, torch.empty(0))(x)
    except (RuntimeError, AttributeError):
        return False
    want = x @ weight.T
    return bool((got - want).norm() < 0.05 * want.norm())
