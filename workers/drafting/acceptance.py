"""How likely is a proposed token to be accepted? Learned while serving, from what happened to earlier ones."""

from __future__ import annotations

import numpy as np

from outrider.kernels.proposals import acceptances
from outrider.workers.sequences.tree import Bools, Floats, Ints

_MAX_WEIGHT = 200.0  # older observations fade beyond this many: texts change
_YIELD_SMOOTHING = 0.05
_FIRST_RULE = np.zeros((), dtype=np.int64)


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
        places = rules * self._seen.shape[1] + sources
        return acceptances(priors, self._accepted.reshape(-1)[places], self._seen.reshape(-1)[places])

    def outcomes(self, first: int, num_keys: int, rules: Ints) -> Floats:
        """float32 [B, num_keys, 2]: how many proposals of each kind from `first` on were accepted, of how many, under
        these rules ([B])."""
        keys = slice(first, first + num_keys)
        return np.stack([self._accepted[rules, keys], self._seen[rules, keys]], axis=-1).astype(np.float32)

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


def follow_errors(yields: Floats, laws: Ints, errors: Floats, met: Bools) -> None:
    """Move expected yields ([num_laws, children]), in place, by how far they were off.

    laws: int64 [M], see `DraftedSlots.laws`; errors: [M, children], 0 where a rank was not proposed (`met`) at all.
    """
    for law in {*laws.tolist()}:
        is_its = laws == law
        counts = np.add.reduce(met[is_its], dtype=np.float64)
        weights = 1.0 - (1.0 - _YIELD_SMOOTHING) ** counts  # as if one came after the other
        yields[law] += weights * np.add.reduce(errors[is_its]) / np.maximum(counts, 1.0)
