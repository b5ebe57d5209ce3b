"""Checks arguments by name: which of them disagrees, and with which."""

from collections.abc import Sequence

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
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor, dimensions in tensors:
        shape = tensor.shape
        if len(shape) != len(dimensions):
            raise ValueError(_message(name, tensor, dimensions, f"{len(dimensions)} dimensions are needed"))
        for dimension, size in zip(dimensions, shape, strict=True):
            if isinstance(dimension, int):
                if size != dimension:
                    raise ValueError(_message(name, tensor, dimensions, f"{size} where {dimension} must be"))
            else:
                expected, where = sizes.setdefault(dimension, (size, name))
                if size != expected:
                    raise ValueError(
                        _message(name, tensor, dimensions, f"{dimension} is {expected} in {where}")
                    )


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
