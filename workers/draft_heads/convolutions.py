"""Local convolutions around a layer's attention and MLP (DFlash2; vllm-project/speculators `dflash2`).

Within a block slot t becomes the sum over taps i of k_i * x_{t-i}. A kernel is a base, of each channel, and what a
projection of the row that enters says, of each group of channels. One projection gives the kernel in front of the
inner part and the one behind it; what the inner part itself reads is convolved already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ConvolutionShape:
    """Sizes of a convolution.

    Attributes:
        num_taps: slots that it looks at, its own included; 0 where there is none.
        group_size: channels that share what the projection says.
    """

    num_taps: int
    group_size: int

    @property
    def is_there(self) -> bool:
        return self.num_taps > 0


NO_CONVOLUTION = ConvolutionShape(0, 0)


class BlockConvolution(nn.Module):
    """Around one inner part; nothing but the base's first tap at first, so that it changes nothing."""

    def __init__(self, hidden_size: int, block_size: int, shape: ConvolutionShape) -> None:
        super().__init__()
        self._block_size, self._shape = block_size, shape
        self.num_groups = hidden_size // shape.group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, shape.num_taps, hidden_size))
        self.base_kernel.data[:, 0] = 1.0
        self.kernel_projection = nn.Linear(hidden_size, 2 * shape.num_taps * self.num_groups, bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def forward(self, x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """x: [S * block_size, hidden], the slots of a block together."""
        kernels = self.kernel_projection(x).unflatten(-1, (2, self._shape.num_taps, self.num_groups))
        return self._convolved(inner(self._convolved(x, kernels[:, 0], 0)), kernels[:, 1], 1)

    def _convolved(self, x: Tensor, said: Tensor, which: int) -> Tensor:
        """said: [N, taps, groups]; which: 0 in front, 1 behind."""
        blocks = x.unflatten(0, (-1, self._block_size))  # [S, block, hidden]
        kernel = self.base_kernel[which] + said.repeat_interleave(self._shape.group_size, dim=-1)
        out = torch.zeros_like(x)
        for tap in range(self._shape.num_taps):
            before = F.pad(blocks, (0, 0, tap, 0))[:, : self._block_size].flatten(0, 1)
            out = out + before * kernel[:, tap]
        return out
