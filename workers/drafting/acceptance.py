"""How likely is a proposed token to be accepted? Learned while serving, from what happened to earlier ones."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from outrider.workers.sequences.tree import Bools, Floats, Ints

_PRIOR_WEIGHT = 6.0  # observations a prior is worth
_MAX_WEIGHT = 200.0  # older observations fade beyond this many: texts change
_MAX_RANK = 4  # proposals behind it are counted as one kind
_NUM_RANKS = _MAX_RANK + 1
_YIELD_SMOOTHING = 0.05
_RISING_EDGES = np.array((-5.0, -3.5, -2.2, -1.3, -0.7, -0.3, -0.1, -0.02))  # of log-probabilities, nats
_NUM_EDGES = len(_RISING_EDGES)
_FIRST_RULE = np.zeros((), dtype=np.int64)

NUM_SAMPLED_KINDS = 2 * _NUM_RANKS * (_NUM_EDGES + 1)
"""Kinds of `priors_and_kinds`."""


class AcceptanceEstimator:
    """Accepted fraction per kind of proposal (method, rank among siblings, confidence) and rule, with a prior for the
    unseen. Rules are those of `DraftedSlots.rules`: what one refuses another may keep.

    A proposal's key is stored in its tree node as `source`; once the target has sampled after the node's parent,
    `observe` counts whether the proposal was it. Proposals below a rejected parent teach nothing.
    """

    def __init__(self, num_rules: int = 1) -> None:
        self._accepted = np.zeros((num_rules, 1))  # key 0 is the roots'
        self._seen = np.zeros((num_rules, 1))

    def reserve(self, num_keys: int) -> int:
        """Room for a method's kinds of proposals; returns the first of its keys."""
        num_rules, first = self._seen.shape
        room = np.zeros((num_rules, num_keys))
        self._accepted = np.concatenate([self._accepted, room], axis=1)
        self._seen = np.concatenate([self._seen, room], axis=1)
        return first

    def estimate(self, sources: Ints, priors: Floats, rules: Ints = _FIRST_RULE) -> Floats:
        """Probabilities of acceptance, between 0.001 and 0.995; of one shape, which `rules` is broadcast to."""
        estimates = _PRIOR_WEIGHT * priors
        places = rules * self._seen.shape[1] + sources
        estimates += self._accepted.reshape(-1)[places]
        estimates /= self._seen.reshape(-1)[places] + _PRIOR_WEIGHT
        np.maximum(estimates, 0.001, out=estimates)
        return np.minimum(estimates, 0.995, out=estimates)

    def observe(self, sources: Ints, accepted: Bools, rules: Ints = _FIRST_RULE) -> None:
        """Count outcomes; [M] each, which `rules` is broadcast to."""
        all_seen, all_accepted = self._seen.reshape(-1), self._accepted.reshape(-1)
        places = rules * self._seen.shape[1] + sources
        np.add.at(all_seen, places, 1.0)
        np.add.at(all_accepted, places[accepted], 1.0)
        seen = all_seen[places]
        if np.count_nonzero(seen > _MAX_WEIGHT):
            # A place that comes repeatedly is given the same each time.
            fade = _MAX_WEIGHT / np.maximum(seen, _MAX_WEIGHT)
            all_seen[places] = seen * fade
            all_accepted[places] *= fade


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


def follow_errors(yields: Floats, laws: Ints, errors: Floats, met: Bools) -> None:
    """Move expected yields ([num_laws, children]), in place, by how far they were off.

    laws: int64 [M], see `DraftedSlots.laws`; errors: [M, children], 0 where a rank was not proposed (`met`) at all.
    """
    for law in {*laws.tolist()}:
        is_its = laws == law
        counts = np.add.reduce(met[is_its], dtype=np.float64)
        weights = 1.0 - (1.0 - _YIELD_SMOOTHING) ** counts  # as if one came after the other
        yields[law] += weights * np.add.reduce(errors[is_its]) / np.maximum(counts, 1.0)
