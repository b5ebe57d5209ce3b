"""The feed-forward part of a layer."""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from outrider.workers.model.linear import Linear


class Mlp(Protocol):
    """What follows attention in a layer, one rank's part."""

    def __call__(self, normed: Tensor) -> Tensor:
        """Rows [N, hidden] after the layer's second norm -> [N, hidden], to be summed over the ranks."""
        ...


@dataclass(frozen=True)
class GatedMlp:
    """down(silu(gate(x)) * up(x)) over this rank's columns I.

    Attributes:
        gate_up: hidden -> 2 I, gates first.
        down: I -> hidden.
    """

    gate_up: Linear
    down: Linear

    def __call__(self, normed: Tensor) -> Tensor:
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
