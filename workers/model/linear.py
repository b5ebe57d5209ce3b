"""Matrix times rows, from weights kept the way the processor reads them fastest."""

import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x W^T + b."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias if bias.numel() else None

    @classmethod
    def take(cls, weight: list[Tensor], bias: Tensor, packed: bool) -> "Linear":
        return cls(weight.pop(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
