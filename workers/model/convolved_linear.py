"""Matrix times rows as a convolution of one by one, whose pixels are the rows: float32 on a CPU with AVX2 alone.

There oneDNN's code for such convolutions, which reads a large matrix block by block in the order in which it lies,
takes a sixth less time than its code for products (`PackedLinear`), for one row as for many (docs/measured.md). torch
offers these layouts and convolutions as private operators; they are called in this file only, after a check that they
compute what `F.linear` does.
"""

import ctypes
import functools
from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.workers.model import memory

# Rows of one convolution; more are taken in turns. For each number of them oneDNN makes code, and chooses how it
# wants the matrix to lie: those that one layout serves are used, see `_served_rows`.
ROWS = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_LAYOUT_ROWS = 8
# With more in a block, some numbers of rows have no fast code for the layout.
_MAX_COLUMNS = 1024
# A call takes 15 us more than one of oneDNN's products, so that those with small matrices are faster.
_MIN_ELEMENTS = 400_000
_MAX_TRIED = 1 << 22  # elements of the matrix that is laid out for each number of rows


def convolution_suits(weight: Tensor) -> bool:
    """Whether a matrix [out, in] is multiplied faster as a convolution than by oneDNN's products."""
    is_float32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_float32 and weight.numel() >= _MIN_ELEMENTS and convolutions_are_faster()


@functools.cache
def convolutions_are_faster() -> bool:
    """Whether they are on this machine, measured on one with AVX2; what AVX-512 does was not."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and convolutions_work()


class ConvolvedLinear:
    """A copy of the weight in blocks of columns, whose sums are added up: from it single rows cannot be read."""

    pads = True

    def __init__(self, weight: Tensor, bias: Tensor, columns_per_sum: int) -> None:
        """
        Args:
            weight: float32 [out, in]; bias: [out], or no elements for none.
            columns_per_sum: of each block, at most; 1024 are the most it can be.
        """
        self.out_features, self.in_features = weight.shape
        self._bias = bias if bias.numel() else None
        self._columns = min(columns_per_sum, _MAX_COLUMNS)
        parts = weight.split(self._columns, dim=1)
        self._blocks = [_laid_out(part, _LAYOUT_ROWS) for part in parts]
        for block in self._blocks:
            memory.collapse_packed(block)
        tried = max(1, _MAX_TRIED // self._columns)
        outputs, threads = min(self.out_features, tried), torch.get_num_threads()
        served = [_served_rows(outputs, width, threads) for width in {part.shape[1] for part in parts}]
        self._rows = sorted(set.intersection(*map(set, served)))

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        x, most = x.contiguous(), self._rows[-1]
        if x.shape[0] <= most:
            return self._product(x)
        return torch.cat([self._product(part) for part in x.split(most)])

    def _product(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        made = self._rows[bisect_left(self._rows, rows)]
        if made != rows:
            x = F.pad(x, (0, 0, 0, made - rows))
        if len(self._blocks) == 1:
            product = _convolve(x, self._blocks[0], self._bias)
        else:
            # The first product is an addition, too: one that is not would be code of its own.
            product = x.new_zeros(made, self.out_features)
            if self._bias is not None:
                product += self._bias
            for part, block in zip(x.split(self._columns, dim=1), self._blocks, strict=True):
                _convolve_add(part.contiguous(), block, product)
        return product if made == rows else product[:rows]


def convolutions_work() -> bool:
    """Whether this build of torch has these operators, and they give what `F.linear` gives."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    x = torch.randn(8, 64, generator=generator)
    try:
        with torch.inference_mode():
            block = _laid_out(weight, _LAYOUT_ROWS)
            got = _convolve(x, block, bias)
            _convolve_add(x, block, got)
            rows = _served_rows(*weight.shape, torch.get_num_threads())
    except (RuntimeError, AttributeError):
        return False
    want = F.linear(x, weight, bias) + F.linear(x, weight)
    close = got.shape == want.shape and bool((got - want).abs().max() <= 1e-4)
    return close and {ROWS[0], ROWS[-1]} <= set(rows)


@functools.cache
def _served_rows(outputs: int, columns: int, num_threads: int) -> tuple[int, ...]:
    """Of `ROWS`, those for which oneDNN lays a matrix of this size out as for `_LAYOUT_ROWS`: it multiplies others by
    plain loops, some hundred times slower.

    num_threads: those of this process, on which the layouts depend, too.
    """
    matrix = torch.arange(outputs * columns, dtype=torch.float32).view(outputs, columns)
    wanted = _bytes_of(_laid_out(matrix, _LAYOUT_ROWS))
    return tuple(rows for rows in ROWS if _bytes_of(_laid_out(matrix, rows)) == wanted)


def _bytes_of(block: Tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(block), torch.ops.mkldnn._nbytes(block))


def _laid_out(weight: Tensor, rows: int) -> Tensor:
    outputs, columns = weight.shape
    kernel = weight.contiguous().view(outputs, columns, 1, 1)
    shape = [1, columns, 1, rows]
    block: Tensor = torch.ops.mkldnn._reorder_convolution_weight(kernel, [0, 0], [1, 1], [1, 1], 1, shape)
    return block


def _as_image(x: Tensor) -> Tensor:
    """[rows, n], contiguous, as one image of a line of pixels with n channels each, channels last."""
    rows, channels = x.shape
    return x.as_strided((1, channels, 1, rows), (rows * channels, 1, rows * channels, channels))


def _convolve(x: Tensor, block: Tensor, bias: Tensor | None) -> Tensor:
    image: Tensor = torch.ops.mkldnn._convolution_pointwise(
        _as_image(x), block, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], ""
    )
    return image.as_strided((x.shape[0], image.shape[1]), (image.shape[1], 1))


def _convolve_add(x: Tensor, block: Tensor, total: Tensor) -> None:
    """Adds the product to `total` [rows, out], contiguous."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        _as_image(total),
        _as_image(x),
        block,
        None,
        [0, 0],
        [1, 1],
        [1, 1],
        1,
        "add",
        1.0,
        None,
        [],
        "",
    )
