"""Rules of acceptance for tests: one that asks for nothing, and one that asks for everything."""

from __future__ import annotations

import numpy as np

from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.rules import NodeScores, Rule, RuleNeeds, Verdicts, follow, sampled_children
from outrider.workers.sequences.tree import DraftTrees, Ints


class EverySecond(Rule):
    """Keeps every second drafted token of a path, and one that the target does not say where there is one; the others
    as `exact` does."""

    name = "every_second"
    is_lossless = False

    def verdict(self, trees: DraftTrees, scores: NodeScores) -> Verdicts:
        kept = (depths_of(trees) % 2 == 0) & trees.exists
        kept[:, 0] = False
        sampled = sampled_children(trees, scores)
        has_others = np.zeros_like(kept)  # by parent
        owners, nodes = np.nonzero(kept & ~sampled)
        has_others[owners, trees.parents[owners, nodes]] = True
        crowded_out = kept & sampled & np.take_along_axis(has_others, trees.parents, axis=1)
        return follow(trees, scores, (sampled | kept) & ~crowded_out)


class Typical(Rule):
    """Keeps tokens that are not much less likely than the law's typical one (as arXiv 2202.00666): 1 nat.

    It also asks for hidden rows. `seen`: trees, scores and verdicts in order.
    """

    name = "typical"
    is_lossless = False

    @property
    def needs(self) -> RuleNeeds:
        return RuleNeeds(child_logprobs=True, entropy=True, hidden=HiddenNeeds((1,)))

    def __init__(self) -> None:
        self.seen: list[tuple[DraftTrees, NodeScores, Verdicts]] = []

    def verdict(self, trees: DraftTrees, scores: NodeScores) -> Verdicts:
        surprise = np.take_along_axis(scores.entropies, trees.parents, axis=1)
        kept = (scores.child_logprobs > -surprise - 1.0) & trees.exists
        kept[:, 0] = False
        verdicts = follow(trees, scores, sampled_children(trees, scores) | kept)
        self.seen.append((trees, scores, verdicts))
        return verdicts


def depths_of(trees: DraftTrees) -> Ints:
    """[B, K]"""
    depths = np.zeros_like(trees.parents)
    for node in range(1, depths.shape[1]):
        above = trees.parents[:, node]
        depths[:, node] = depths[np.arange(len(depths)), above] + 1
    return depths
