"""A check of a kernel: launches with their inputs, what must come out, and how far off it may be.

Outputs lie between guard bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.launch_plans import LaunchPlan

GUARD_BYTES = 256
GUARD_VALUE = 0xA5


@dataclass(frozen=True)
class Check:
    """`actual` must match `expected`: exactly with tolerance 0, else by relative error of its worst row."""

    name: str
    actual: Tensor
    expected: Tensor
    tolerance: float

    def error(self) -> float:
        actual, expected = self.actual.cpu(), self.expected
        if self.tolerance == 0:
            bits = [x.contiguous().view(torch.uint8) for x in (actual, expected)]  # NaN equals itself
            return 0.0 if torch.equal(*bits) else float("inf")
        rows = [x.reshape(x.shape[0], -1).double() for x in (actual, expected)]
        difference = (rows[0] - rows[1]).norm(dim=1) / rows[1].norm(dim=1).clamp_min(1e-30)
        return float("inf") if difference.isnan().any() else difference.max().item()


@dataclass(frozen=True)
class PreparedCase:
    """Launches and what they must do.

    Attributes:
        num_bytes, num_flops: least memory traffic and arithmetic of the launches, for the roofline.
    """

    name: str
    kernel: str
    plans: tuple[LaunchPlan, ...]
    checks: tuple[Check, ...]
    guarded: tuple[Tensor, ...]
    num_bytes: int
    num_flops: int

    def verify(self) -> list[str]:
        """What is wrong, one line each; empty when all is well."""
        problems = [
            f"{self.name}: {check.name} is off by {check.error():.2e}, allowed {check.tolerance:.0e}"
            for check in self.checks
            if not check.error() <= check.tolerance
        ]
        for buffer in self.guarded:
            ends = torch.cat((buffer[:GUARD_BYTES], buffer[-GUARD_BYTES:]))
            if (ends != GUARD_VALUE).any():
                problems.append(f"{self.name}: bytes beside an output were overwritten")
        return problems

    def outputs(self) -> list[Tensor]:
        return [check.actual for check in self.checks]


class Guards:
    """Makes output tensors that lie between guard bytes; filled with NaN (floats) or -7."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full(
            (num_bytes + 2 * GUARD_BYTES,), GUARD_VALUE, dtype=torch.uint8, device=self.device
        )
        self.buffers.append(buffer)
        inside = buffer[GUARD_BYTES : GUARD_BYTES + num_bytes].view(dtype).view(shape)
        return inside.fill_(float("nan") if dtype.is_floating_point else -7)

    def copy(self, source: Tensor) -> Tensor:
        return self.empty(tuple(source.shape), source.dtype).copy_(source)
