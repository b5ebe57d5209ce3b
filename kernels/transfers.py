"""Many small arrays to a device in one copy that nobody waits for, and back in one that is waited for.

Each copy from memory that is not pinned lets the host wait until the device has done all it was given before. torch's
host allocator hands pinned memory out again only when the copies from it are done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; what kernels read at once


class Part(NamedTuple):
    """An array within a buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host, on a device: themselves where that is the host, else views of one new buffer there."""
    if device.type == "cpu":
        return list(tensors)
    parts = [Part(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    staged = stage(num_bytes_of(parts), device)
    for view, tensor in zip(views_of(staged, parts), tensors, strict=True):
        view.copy_(tensor)
    return views_of(staged.to(device, non_blocking=True), parts)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device, on the host."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.cpu() for tensor in tensors]
    # Back to back, those of wide elements first: then each begins where its elements may.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
    flat = [tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]
    found = list(tensors)
    for i, part in zip(order, torch.cat(flat).cpu().split([len(x) for x in flat]), strict=True):
        found[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return found


def stage(num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes] on the host, from which copies to the device need not be waited for."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def views_of(buffer: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The arrays that lie one behind the other in a buffer, uint8 [at least `num_bytes_of(parts)`]."""
    views, offset = [], 0
    for part in parts:
        size = math.prod(part.shape) * part.dtype.itemsize
        views.append(buffer[offset : offset + size].view(part.dtype).view(part.shape))
        offset += _aligned(size)
    return views


def num_bytes_of(parts: Sequence[Part]) -> int:
    """What `views_of` needs."""
    return sum(_aligned(math.prod(part.shape) * part.dtype.itemsize) for part in parts)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
