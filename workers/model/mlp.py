"""The feed-forward part of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.silu_mul import silu_mul
from outrider.workers.model.linear import Linear
from outrider.workers.routing import Routes, route


class Mlp(Protocol):
    """What follows attention in a layer, one rank's part."""

    def __call__(self, normed: Tensor, use_kernel: bool = False) -> Tensor:
        """Rows [N, hidden] after the layer's second norm -> [N, hidden], to be summed over the ranks.

        use_kernel: see `silu_mul`.
        """
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

    def __call__(self, normed: Tensor, use_kernel: bool = False) -> Tensor:
        return self.down(silu_mul(self.gate_up(normed), use_kernel))


class Experts(Protocol):
    """The experts of a layer that one rank has, or its part of all."""

    def __call__(self, normed: Tensor, routes: Routes, use_kernel: bool = False) -> Tensor:
        """Rows [N, hidden] -> [N, hidden], what this rank's experts add to each."""
        ...


@dataclass(frozen=True)
class RoutedExperts:
    """A router, the same on all ranks, and this rank's experts.

    Attributes:
        router: float32 [num_experts, hidden].
        experts_per_token, renormalised: see `route`.
    """

    router: Tensor
    experts_per_token: int
    renormalised: bool
    experts: Experts

    def __call__(self, normed: Tensor, use_kernel: bool = False) -> Tensor:
        routes = route(normed, self.router, self.experts_per_token, self.renormalised)
        return self.experts(normed, routes, use_kernel)


class ExpertLoop:
    """One expert after the other, each over the rows that visit it; who is not visited costs nothing. For CPUs."""

    def __init__(self, first: int, experts: Sequence[Mlp]) -> None:
        """experts: those from number `first` on."""
        self._first = first
        self._experts = experts

    def __call__(self, normed: Tensor, routes: Routes, use_kernel: bool = False) -> Tensor:
        total = torch.zeros(normed.shape, dtype=torch.float32, device=normed.device)
        local = routes.experts.flatten() - self._first
        order = local.argsort(stable=True)
        ends = torch.searchsorted(local[order], torch.arange(len(self._experts)), right=True).tolist()
        begin = int((local < 0).sum())
        for expert, end in zip(self._experts, ends, strict=True):
            if end > begin:
                visits = order[begin:end]
                rows = visits // routes.experts.shape[1]
                out = expert(normed[rows]).float() * routes.weights.flatten()[visits, None]
                total.index_add_(0, rows, out)
            begin = end
        return total.to(normed.dtype)


class GroupedExperts:
    """All experts in two grouped products, without a wait for the host, so that it can be part of a CUDA graph.

    torch's grouped matmul takes bfloat16 on NVIDIA GPUs from sm_80 on; with other dtypes torch does without a kernel
    of its own. Not run on a GPU by the maintainers.
    """

    def __init__(self, first: int, gate_up: Tensor, down: Tensor) -> None:
        """Those from number `first` on: gate_up [E, 2 I, hidden], gates first; down [E, hidden, I]. Rows of the
        matrices must be a multiple of 16 bytes long, see `aligned_columns`."""
        self._first = first
        self._gate_up = gate_up.transpose(1, 2)
        self._down = down.transpose(1, 2)

    def __call__(self, normed: Tensor, routes: Routes, use_kernel: bool = False) -> Tensor:
        num_experts, per_row = len(self._gate_up), routes.experts.shape[1]
        local = routes.experts.flatten() - self._first
        is_here = (local >= 0) & (local < num_experts)
        local = local.masked_fill(~is_here, num_experts)
        order = local.argsort(stable=True)
        numbers = torch.arange(num_experts, device=local.device)
        ends = torch.searchsorted(local[order], numbers, right=True).int()
        gate_up = F.grouped_mm(normed[order // per_row], self._gate_up, offs=ends)
        out = F.grouped_mm(silu_mul(gate_up, use_kernel), self._down, offs=ends)
        # Back to the rows' order and summed there, which unlike adding at an index is the same every time. What
        # stands behind the last group is not computed: it may be anything.
        out = out[order.argsort()].float() * routes.weights.view(-1, 1)
        out = out.masked_fill(~is_here[:, None], 0.0)
        return out.view(*routes.experts.shape, -1).sum(1).to(normed.dtype)


def aligned_columns(count: int) -> int:
    """Columns of an expert with which the rows of its matrices are a multiple of 16 bytes long, in any dtype."""
    return -(-count // 8) * 8
