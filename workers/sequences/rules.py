"""Rules of acceptance: which drafted tokens come out. Pure functions of trees, scores and hidden rows.

A rule is chosen per request. It names what it needs of the target, which computes and sends only that, and says
of every tree which path comes out and which token after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from outrider.workers.sequences.hidden import NO_HIDDEN_ROWS, HiddenNeeds
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.segments import pick
from outrider.workers.sequences.tree import Bools, DraftTrees, Floats, Ints


@dataclass(frozen=True)
class RuleNeeds:
    """What a rule reads besides the target's samples."""

    child_logprobs: bool = False  # log p of each drafted token
    entropy: bool = False  # of the target's law after each node
    hidden: HiddenNeeds = NO_HIDDEN_ROWS


@dataclass(frozen=True)
class NodeScores:
    """What the target said of B trees of at most K nodes; padded like `DraftTrees`.

    Attributes:
        tokens: int64 [B, K], the target's own token after each node.
        failed: bool [B, K], where no token can be sampled: the logits are not numbers, or nothing is left of them.
        child_logprobs: float64 [B, K], log p (nats) of each node's own token after its parent; zeros if not asked.
        entropies: float64 [B, K], nats; zeros if not asked.
        hidden: by layer, [B, K, hidden] of the layers that the rule asked for, see `HiddenNeeds`.
    """

    tokens: Ints
    failed: Bools
    child_logprobs: Floats
    entropies: Floats
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdicts:
    """What comes out of B trees.

    Attributes:
        paths: int64 [B, D] accepted nodes, the root first; behind `num_accepted[b] + 1` padding.
        num_accepted: int64 [B] drafted tokens that come out.
        next_tokens: int64 [B] the target's token after the path: "bonus" where the path ends at a leaf, "recovered"
            where the tree offered other tokens there.
        is_kept: bool [B, D] accepted nodes that `exact` would have refused.
        failed: bool [B] the target has no token after the path: the text ends with an error.
    """

    paths: Ints
    num_accepted: Ints
    next_tokens: Ints
    is_kept: Bools
    failed: Bools

    def emitted(self, trees: DraftTrees) -> tuple[Ints, Ints]:
        """Tokens that come out and their origins, int64 [B, D] each: `num_accepted` drafts, then the target's own."""
        tokens = self.emitted_tokens(trees)
        origins = np.zeros(tokens.shape, dtype=np.int64)
        origins[:, :-1] = int(Origin.DRAFT)
        origins[:, :-1][self.is_kept[:, 1:]] = int(Origin.KEPT)
        origins[np.arange(len(origins)), self.num_accepted] = int(Origin.TARGET)
        return tokens, origins

    def emitted_tokens(self, trees: DraftTrees) -> Ints:
        """Tokens that come out, int64 [B, D]; behind `num_accepted[b] + 1` padding."""
        tokens = np.zeros(self.paths.shape, dtype=np.int64)
        tokens[:, :-1] = pick(trees.tokens, self.paths[:, 1:])
        tokens[np.arange(len(tokens)), self.num_accepted] = self.next_tokens
        return tokens


class Rule(ABC):
    """Decides which drafted tokens come out."""

    name: str
    is_lossless: bool
    needs = RuleNeeds()

    @abstractmethod
    def verdict(self, trees: DraftTrees, scores: NodeScores) -> Verdicts:
        """The longest acceptable path of every tree, and the target's token after it."""


class ExactRule(Rule):
    """Accepts a drafted token iff it is the token that the target samples after its parent.

    Siblings hold different tokens, so the path is unique, and the text is what plain decoding gives for the same
    seed.
    """

    name = "exact"
    is_lossless = True

    def verdict(self, trees: DraftTrees, scores: NodeScores) -> Verdicts:
        sampled = sampled_children(trees, scores)
        return follow(trees, scores, sampled, sampled)


def sampled_children(trees: DraftTrees, scores: NodeScores) -> Bools:
    """[B, K]: drafted nodes that hold the token which the target samples after their parents."""
    children = trees.tokens == pick(scores.tokens, trees.parents)
    if np.count_nonzero(scores.failed):
        children &= ~pick(scores.failed, trees.parents)
    children &= trees.exists
    children[:, 0] = False
    return children


def follow(trees: DraftTrees, scores: NodeScores, accepted: Bools, sampled: Bools | None = None) -> Verdicts:
    """Walk from the roots along accepted nodes ([B, K]); of several children the first one is taken.

    sampled: the `sampled_children`, if they are known already.
    """
    num_rows, width = trees.tokens.shape
    row = np.arange(num_rows)
    next_node = np.zeros((num_rows, width), dtype=np.int64)
    # Of several assignments to one place the last holds: nodes backwards, so that it is the first child. Not by
    # views of negative stride: numpy assigns those in the order of memory.
    owners, columns_from_end = accepted[:, ::-1].nonzero()
    nodes = width - 1 - columns_from_end
    next_node[owners, trees.parents[owners, nodes]] = nodes
    columns, num_accepted = [np.zeros(num_rows, dtype=np.int64)], np.zeros(num_rows, dtype=np.int64)
    current = next_node[:, 0]
    while np.count_nonzero(current):
        columns.append(current)
        goes_on = current > 0
        num_accepted += goes_on
        current = next_node[row, current] * goes_on
    paths = np.array([*columns, current]).T.copy()
    lasts = paths[row, num_accepted]
    is_kept = ~pick(sampled_children(trees, scores) if sampled is None else sampled, paths)
    is_kept &= paths > 0
    return Verdicts(paths, num_accepted, scores.tokens[row, lasts], is_kept, scores.failed[row, lasts])


EXACT = ExactRule()
RULES: dict[str, Rule] = {EXACT.name: EXACT}
