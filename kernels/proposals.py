"""What a draft model's proposals are worth: shared by the host, which learns it, and the kernel that grows trees."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PRIOR_WEIGHT = 6.0
"""Observations a prior is worth."""
LEAST_ACCEPTANCE, MOST_ACCEPTANCE = 0.001, 0.995
_MAX_RANK = 4  # proposals behind it are counted as one kind
_NUM_RANKS = _MAX_RANK + 1
_RISING_EDGES = np.array((-5.0, -3.5, -2.2, -1.3, -0.7, -0.3, -0.1, -0.02))  # of log-probabilities, nats
_NUM_EDGES = len(_RISING_EDGES)

NUM_KINDS_OF_LAW = _NUM_RANKS * (_NUM_EDGES + 1)
NUM_SAMPLED_KINDS = 2 * NUM_KINDS_OF_LAW
"""Kinds of `priors_and_kinds`: those of sampled requests, then those of greedy ones."""


def acceptances(priors: Floats, accepted: Floats, seen: Floats) -> Floats:
    """Probabilities, from priors and from how many proposals of the same kind were accepted, of how many."""
    estimates = PRIOR_WEIGHT * priors
    estimates += accepted
    estimates /= seen + PRIOR_WEIGHT
    np.maximum(estimates, LEAST_ACCEPTANCE, out=estimates)
    return np.minimum(estimates, MOST_ACCEPTANCE, out=estimates)


def priors_and_kinds(log_probs: Floats, is_greedy: Bools) -> tuple[Floats, Ints]:
    """Prior acceptance and kind of proposals by rank (0 = best under the shared noise); [M, children] each.

    Greedy and sampled requests ([M]) are counted apart. At temperature 0 a larger model is surer of what a small one
    finds likely. Otherwise the noise, which target and drafter share, has chosen already, so that a high rank
    means more than the bare probability. The priors' constants are fitted to Qwen2.5-Coder 1.5B with 0.5B.
    """
    of_ranks = _of_ranks(log_probs.shape[1])
    probs = np.exp(np.minimum(log_probs, 0.0))
    num_greedy = np.count_nonzero(is_greedy)
    if num_greedy < len(is_greedy):
        priors = np.minimum(0.35, 0.02 + 0.8 * probs) / of_ranks.later
        priors[:, 0] = 0.35 + 0.6 * probs[:, 0]
    if num_greedy:
        first_misses = (1.0 - probs[:, :1]) ** 1.5
        greedy = np.minimum(probs * of_ranks.greedy_scales, first_misses * of_ranks.halves)
        greedy[:, :1] = 1.0 - first_misses
        priors = greedy if num_greedy == len(is_greedy) else np.where(is_greedy[:, None], greedy, priors)
    # How many edges lie above each: the edges fall, and the search wants them rising.
    kinds = of_ranks.last_kinds[is_greedy.view(np.int8)]
    kinds -= _RISING_EDGES.searchsorted(log_probs, side="right")
    return priors, kinds


class _OfRanks(NamedTuple):
    """What depends on the ranks of proposals alone; [children] each."""

    later: Ints  # the rank, 1 at least
    greedy_scales: Floats
    halves: Floats  # 2 to the minus rank
    last_kinds: Ints  # [2, children], of sampled and greedy requests: of proposals below all edges


@cache
def _of_ranks(num: int) -> _OfRanks:
    ranks = np.arange(num)
    later = np.maximum(ranks, 1)
    sampled = np.minimum(ranks, _MAX_RANK) * (_NUM_EDGES + 1) + _NUM_EDGES
    last_kinds = np.stack([sampled, sampled + _NUM_RANKS * (_NUM_EDGES + 1)])
    return _OfRanks(later, 0.85 / later, np.exp2(-ranks.astype(np.float64)), last_kinds)
