"""How likely is a proposed token to be accepted? Learned while serving, from what happened to earlier ones."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC

_PRIOR_WEIGHT = 6.0  # observations a prior is worth
_MAX_WEIGHT = 200.0  # older observations fade beyond this many: texts change
_LOG_PROB_EDGES = (-0.02, -0.1, -0.3, -0.7, -1.3, -2.2, -3.5, -5.0)  # nats


class AcceptanceEstimator:
    """Accepted fraction per kind of proposal (method, rank among siblings, confidence), with a prior for the unseen.

    A proposal's `source` key is stored in its tree node; once the target has sampled after the node's parent,
    `observe` counts whether the proposal was it. Proposals below a rejected parent teach nothing.
    """

    def __init__(self) -> None:
        self._accepted: dict[tuple[int, ...], float] = {}
        self._seen: dict[tuple[int, ...], float] = {}

    def estimate(self, source: tuple[int, ...], prior: float) -> float:
        """Probability of acceptance, between 0.001 and 0.995."""
        accepted = self._accepted.get(source, 0.0) + _PRIOR_WEIGHT * prior
        return min(max(accepted / (self._seen.get(source, 0.0) + _PRIOR_WEIGHT), 0.001), 0.995)

    def observe(self, source: tuple[int, ...], accepted: bool) -> None:
        """Count one outcome."""
        seen = self._seen.get(source, 0.0)
        fade = _MAX_WEIGHT / (_MAX_WEIGHT + 1.0) if seen >= _MAX_WEIGHT else 1.0
        self._seen[source] = seen * fade + 1.0
        self._accepted[source] = self._accepted.get(source, 0.0) * fade + float(accepted)


def log_prob_bucket(log_prob: float) -> int:
    """Bucket of a draft log-probability (nats); 0 is the most confident."""
    return sum(log_prob < edge for edge in _LOG_PROB_EDGES)


def model_source(
    method: int, rank: int, log_probs: SequenceABC[float], is_greedy: bool
) -> tuple[tuple[int, ...], float]:
    """Estimate key and prior for the proposal of `rank` (0 = best under the shared noise) of a draft model.

    Greedy and sampled requests are counted apart. At temperature 0 a larger model is surer of what a small one
    finds likely. Otherwise the noise, which target and drafter share, has chosen already, so that a high rank
    means more than the bare probability. The priors' constants are fitted to Qwen2.5-Coder 1.5B with 0.5B.
    """
    q = math.exp(min(log_probs[rank], 0.0))
    if is_greedy:
        first_misses = (1.0 - math.exp(min(log_probs[0], 0.0))) ** 1.5
        prior = 1.0 - first_misses if rank == 0 else min(0.85 * q / rank, first_misses / 2**rank)
    else:
        prior = 0.35 + 0.6 * q if rank == 0 else min(0.35, 0.02 + 0.8 * q) / rank
    return (method, int(is_greedy), min(rank, 4), log_prob_bucket(log_probs[rank])), prior
