"""How likely is a proposed token to be accepted? Learned while serving, from what happened to earlier ones."""

from __future__ import annotations

import numpy as np

from outrider.workers.sequences.tree import Bools, Floats, Ints

_PRIOR_WEIGHT = 6.0  # observations a prior is worth
_MAX_WEIGHT = 200.0  # older observations fade beyond this many: texts change


class AcceptanceEstimator:
    """Accepted fraction per kind of proposal (method, rank among siblings, confidence), with a prior for the unseen.

    A proposal's key is stored in its tree node as `source`; once the target has sampled after the node's parent,
    `observe` counts whether the proposal was it. Proposals below a rejected parent teach nothing.
    """

    def __init__(self) -> None:
        self._accepted = np.zeros(1)  # key 0 is the roots'
        self._seen = np.zeros(1)

    def reserve(self, num_keys: int) -> int:
        """Room for a method's kinds of proposals; returns the first of its keys."""
        first = len(self._seen)
        self._accepted = np.concatenate([self._accepted, np.zeros(num_keys)])
        self._seen = np.concatenate([self._seen, np.zeros(num_keys)])
        return first

    def estimate(self, sources: Ints, priors: Floats) -> Floats:
        """Probabilities of acceptance, between 0.001 and 0.995; all of one shape."""
        accepted = self._accepted[sources] + _PRIOR_WEIGHT * priors
        return np.clip(accepted / (self._seen[sources] + _PRIOR_WEIGHT), 0.001, 0.995)

    def observe(self, sources: Ints, accepted: Bools) -> None:
        """Count outcomes; [M] each."""
        self._seen += np.bincount(sources, minlength=len(self._seen))
        self._accepted += np.bincount(sources[accepted], minlength=len(self._seen))
        fade = _MAX_WEIGHT / np.maximum(self._seen, _MAX_WEIGHT)
        self._seen *= fade
        self._accepted *= fade
