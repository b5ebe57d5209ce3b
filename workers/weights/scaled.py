"""A matrix of narrow numbers with scales, in the one form that every format is read into.

Whoever computes with it need not know how its file keeps it, nor which part of a whole it is: cutting, reordering and
joining are done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outrider.kernels.round_rows import round_rows
from outrider.workers.weights.inputs import Inputs, StaticInputs

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


_Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ScaledMatrix:
    """value[i, j] = values[i, j] * scales[i, j // group] + shifts[i, j // group].

    Attributes:
        values: [rows, columns], which are [out, in]; float8_e4m3fn or a type of integers.
        scales: float32 [rows, G], G = ceil(columns / group).
        group: columns that share a scale; the last ones of a row may be fewer.
        shifts: float32 [rows, G], or None for none.
        inputs: how the rows that it is multiplied with are rounded; None: they are not.
    """

    values: Tensor
    scales: Tensor
    group: int
    shifts: Tensor | None = None
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        assert self.scales.shape == (rows, -(-columns // self.group)), (self.scales.shape, self.group)
        assert self.shifts is None or self.shifts.shape == self.scales.shape

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        shifts = 0 if self.shifts is None else self.shifts.nbytes
        return self.values.nbytes + self.scales.nbytes + shifts

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns] in `dtype`, computed in float32."""
        values = self.values.float()
        # Group by group, a view of the columns: the scales of all columns would be as large as the matrix.
        for number in range(self.scales.shape[1]):
            part = values[:, number * self.group : (number + 1) * self.group]
            part *= self.scales[:, number, None]
            if self.shifts is not None:
                part += self.shifts[:, number, None]
        return values.to(dtype)

    def in_groups_of(self, width: int) -> ScaledMatrix:
        """The same values; every group in several of `width` columns, which divides it."""
        if width == self.group:
            return self
        assert self.group % width == 0, (self.group, width)
        num_groups = -(-self.values.shape[1] // width)

        def split(of_groups: Tensor) -> Tensor:
            return of_groups.repeat_interleave(self.group // width, dim=1)[:, :num_groups].contiguous()

        shifts = None if self.shifts is None else split(self.shifts)
        return replace(self, scales=split(self.scales), shifts=shifts, group=width)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for matrices whose rows can be those of one."""
        return self.values.dtype, self.values.shape[1], self.group, self.inputs, self.shifts is None

    def to(self, device: torch.device) -> ScaledMatrix:
        """On another device."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: _Change) -> ScaledMatrix:
        shifts = None if self.shifts is None else change(self.shifts)
        return replace(self, values=change(self.values), scales=change(self.scales), shifts=shifts)


def round_inputs(
    x: Tensor, inputs: Inputs, group: int, by_column: bool = False, use_kernel: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows as FP8 with their scales, computed in float32, see `round_rows`.

    A row's numbers depend on nothing but the row, so that they are the same alone and among others.

    Args:
        x: [N, columns].
        group: columns that share a scale in the matrix.
        by_column: rows padded and scales laid out as torch's product by groups takes them.
        use_kernel: run the CUDA kernel.

    Returns:
        FP8 [N, columns]; float32 [N, G], with G = 1 or a scale for each group.
    """
    columns = x.shape[1]
    if isinstance(inputs, StaticInputs):
        return round_rows(x, columns, math.inf, 0.0, inputs.scale, by_column, use_kernel)
    width = min(group, columns) if inputs.by_group else columns
    return round_rows(x, width, inputs.bound, inputs.least_scale, None, by_column, use_kernel)


def rounded_inputs(x: Tensor, inputs: Inputs, group: int, use_kernel: bool = False) -> Tensor:
    """Rows [N, columns] rounded to FP8 and back, see `round_inputs`."""
    values, scales = round_inputs(x, inputs, group, use_kernel=use_kernel)
    # The form of a matrix with scales, whose rows these are.
    width = group if scales.shape[1] > 1 else x.shape[1]
    return ScaledMatrix(values, scales, width).dequantised(x.dtype)


def joined(parts: Sequence[ScaledMatrix]) -> ScaledMatrix:
    """The rows of all of them, one behind the other; all of one `kind`."""
    first = parts[0]
    if len(parts) == 1:
        return first
    assert all(part.kind == first.kind for part in parts)
    shifts = None if first.shifts is None else torch.cat([p.shifts for p in parts if p.shifts is not None])
    values = torch.cat([_bytes(part.values) for part in parts]).view(first.values.dtype)
    return replace(first, values=values, scales=torch.cat([part.scales for part in parts]), shifts=shifts)


def _bytes(values: Tensor) -> Tensor:
    """torch moves what it cannot compute with (FP8 on a CPU) as bytes."""
    return values.view(torch.uint8) if values.itemsize == 1 else values
