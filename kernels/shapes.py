"""Checks arguments by name: which of them disagrees, and with which."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Dimension = str | int
NamedTensor = tuple[str, Tensor, tuple[Dimension, ...]]


def check_shapes(tensors: Sequence[NamedTensor]) -> None:
    """Every tensor must have its dimensions; a dimension's name means the same size everywhere.

    Args:
        tensors: (argument, tensor, dimensions), a dimension being a name ("NQ") or a number.

    Raises:
        ValueError: e.g. "k_pages must be [P, PAGE, HK, D], got [9, 16, 2, 64]; D is 128 in q".
    """
    _, values, dimensions = zip(*tensors, strict=True)
    ranks, pick, equals, numbers = _pairs(dimensions)
    shapes = [tensor.shape for tensor in values]
    if [*map(len, shapes)] == ranks:
        sizes = (*chain.from_iterable(shapes), *numbers, 0)
        if pick(sizes) == equals(sizes):
            return
    raise ValueError(_disagreement(tensors))


@cache
def _pairs(
    dimensions: tuple[tuple[Dimension, ...], ...],
) -> tuple[list[int], Callable[[Any], Any], Callable[[Any], Any], list[int]]:
    """What `check_shapes` compares, found once for each list of dimensions, since every layer of every forward asks:
    the lengths of shapes; of all sizes and behind them the numbers that are returned last, those that must equal
    others; the others."""
    flat = [dimension for each in dimensions for dimension in each]
    numbers = [dimension for dimension in flat if isinstance(dimension, int)]
    first: dict[str, int] = {}
    where, equals, num_numbers = [-1], [-1], 0  # one is always there
    for place, dimension in enumerate(flat):
        if isinstance(dimension, int):
            other = len(flat) + num_numbers
            num_numbers += 1
        else:
            other = first.setdefault(dimension, place)
        if other != place:
            where.append(place)
            equals.append(other)
    return [len(each) for each in dimensions], itemgetter(*where), itemgetter(*equals), numbers


def _disagreement(tensors: Sequence[NamedTensor]) -> str:
    """The first there is."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor, dimensions in tensors:
        if len(tensor.shape) != len(dimensions):
            return _message(name, tensor, dimensions, f"{len(dimensions)} dimensions are needed")
        for dimension, size in zip(dimensions, tensor.shape, strict=True):
            if isinstance(dimension, int):
                if size != dimension:
                    return _message(name, tensor, dimensions, f"{size} where {dimension} must be")
            else:
                expected, where = sizes.setdefault(dimension, (size, name))
                if size != expected:
                    return _message(name, tensor, dimensions, f"{dimension} is {expected} in {where}")
    raise AssertionError("all of them agree")


def _message(name: str, tensor: Tensor, dimensions: Sequence[Dimension], reason: str) -> str:
    wanted = ", ".join(str(dimension) for dimension in dimensions)
    return f"{name} must be [{wanted}], got {list(tensor.shape)}; {reason}"


def check_kernel_arguments(tensors: Sequence[tuple[str, Tensor, torch.dtype]]) -> None:
    """What only the CUDA kernels ask for: one device, exact types, and rows whose elements lie side by side.

    Raises:
        ValueError: naming the argument.
    """
    first_name, first, _ = tensors[0]
    for name, tensor, dtype in tensors:
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {first_name} is on {first.device}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must have its last dimension contiguous, got strides {list(tensor.stride())}"
            )
