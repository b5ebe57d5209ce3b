"""Which experts of a layer the rows of a forward go through: for the models that are served, and draft heads."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Where rows go.

    Attributes:
        experts: int64 [N, k], of all experts of the layer.
        weights: float32 [N, k], how much of each expert's output a row takes.
    """

    experts: Tensor
    weights: Tensor


def route(normed: Tensor, router: Tensor, experts_per_token: int, renormalised: bool) -> Routes:
    """The likeliest experts of rows [N, hidden], by a softmax over all of them.

    In float32 whatever the rows' dtype: experts that are close would else be mixed up by rounding. Two that are
    closer than float32 tells apart may still swap, as two tokens may.

    Args:
        router: float32 [num_experts, hidden].
        renormalised: weights of a row sum to 1.
    """
    probs = F.linear(normed.float(), router).softmax(-1)
    weights, experts = probs.topk(experts_per_token, dim=-1)
    return Routes(experts, weights / weights.sum(-1, keepdim=True) if renormalised else weights)
