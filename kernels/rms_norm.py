"""The norm between layers (Zhang & Sennrich, arXiv:1910.07467)."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight over the last dimension; a new tensor [*, width] in the dtype of x.

    Args:
        x: [*, width]; weight: [width] of the same dtype.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    # torch takes it apart into ten operators, each of which costs a small model's row more than its arithmetic.
    length = torch.linalg.vector_norm(x, 2, -1, True)
    factor = torch.addcmul(_scalar(eps), length, length, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * factor).mul_(weight)


@cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)
