"""How likely is each candidate of a level the target's token, given the noise that both share?

Candidates are ranked by l / T + g, the drafter's log-law under the request's temperature and the noise of their
position. If the target's log-law differs from it like Gumbel noise of scale sigma, the target samples candidate i
with probability softmax((l / T + g) / sigma): the gap to the next one in units of sigma counts, not the bare
probability. sigma grows with the level, and what a text is like changes it, so that it is fitted while serving, of
each level and law, by logistic regression on what came out. Beside the candidates stands "none of them", whose
score is linear in how sure the drafter is.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np

from outrider.kernels.noise import gumbel_from_hash, hash_rows
from outrider.workers.sampling.context import RowParameters, SampledRows
from outrider.workers.sequences.tree import Floats, Ints

_RATE = 0.05  # of a step along the slope of one outcome
_LEAST_INVERSE, _MOST_INVERSE = 0.05, 20.0  # of sigma
_LEAST_SCORE = -1e30
_LEAST_SURENESS = -5.0  # log-probability, nats
_FIRST = (1.0, 0.0, 0.5)  # 1 / sigma; the score of none: its offset, and its fall with sureness
_EDGES = np.array((0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95))

NUM_CERTAINTIES = len(_EDGES) + 1
"""Kinds of `certainty_of`."""


def certainty_of(probabilities: Floats) -> Ints:
    """Kinds of proposals by how likely they are thought to be: what is thought is measured, too."""
    return _EDGES.searchsorted(probabilities, side="right")


def perturbed(log_probs: Floats, tokens: Ints, sampled: SequenceABC[SampledRows]) -> Floats:
    """log p̃ + G of candidates [M, R] of these M rows. Greedy ones have no noise."""
    rows = RowParameters(sampled)
    noise = gumbel_from_hash(hash_rows(rows.keys, tokens))
    return log_probs + np.where(rows.temperatures[:, None] > 0.0, noise, 0.0)


@dataclass(frozen=True)
class Asked:
    """Candidates below one node, until it is known what came out there.

    Attributes:
        path: tokens from below the root down to the node.
        tokens, scores: [R], as `perturbed` gives them.
        law: see `DraftedSlots.laws`.
    """

    path: tuple[int, ...]
    tokens: Ints
    scores: Floats
    sureness: float
    law: int

    def outcome(self, came_out: list[int]) -> int:
        """Which of the candidates came out, R for none of them, -1 where the node did not.

        came_out: the tokens behind the root that the candidates' tree had.
        """
        level = len(self.path)
        if len(came_out) <= level or tuple(came_out[:level]) != self.path:
            return -1
        found = np.flatnonzero(self.tokens == came_out[level])
        return int(found[0]) if len(found) else len(self.tokens)


class Spreads:
    """sigma and the score of none, by law and level."""

    def __init__(self, num_laws: int, num_levels: int) -> None:
        self._fitted = np.tile(np.array(_FIRST), (num_laws, num_levels, 1))

    def sigma(self, law: int, level: int) -> float:
        """As far as it is known."""
        return float(1.0 / self._fitted[law, level, 0])

    def probabilities(self, scores: Floats, sureness: Floats, laws: Ints, level: int) -> Floats:
        """[M, R] of candidates with these scores, -inf where there is none.

        Args:
            sureness: [M], log of how likely the drafter is right at all.
        """
        inverse, offset, fall = self._fitted[laws, level].T
        none = np.exp(offset - fall * np.maximum(sureness, _LEAST_SURENESS))
        # Without any candidate no gap is a number.
        weights = np.exp(inverse[:, None] * (scores - np.maximum(scores[:, :1], _LEAST_SCORE)))
        found: Floats = weights / (weights.sum(axis=1) + none)[:, None]
        return found

    def learn(self, asked: Asked, which: int) -> None:
        """One outcome, see `Asked.outcome`; one step uphill in its log-likelihood."""
        level, law = len(asked.path), np.array([asked.law])
        sureness = np.array([asked.sureness])
        found = self.probabilities(asked.scores[None], sureness, law, level)[0]
        gaps = np.where(found > 0.0, asked.scores - asked.scores[0], 0.0)
        is_none = which == len(found)
        slope = -(found * gaps).sum() + (0.0 if is_none else gaps[which])
        miss = float(is_none) - (1.0 - found.sum())
        fitted = self._fitted[asked.law, level]
        fitted += _RATE * np.array((slope, miss, -miss * max(asked.sureness, _LEAST_SURENESS)))
        fitted[0] = np.clip(fitted[0], _LEAST_INVERSE, _MOST_INVERSE)
