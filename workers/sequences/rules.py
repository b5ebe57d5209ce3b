"""Rules of acceptance: which drafted tokens come out. Pure functions of trees, scores and hidden rows.

A rule is chosen per request. It names what it needs of the target, which computes and sends only that, and says
of every tree which path comes out and which token after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from outrider.workers.sequences.hidden import NO_HIDDEN_ROWS, HiddenNeeds
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.segments import pick
from outrider.workers.sequences.sequence import AcceptanceOptions
from outrider.workers.sequences.tree import Bools, DraftTrees, Floats, Ints

_LEAST_LOG = -1e6  # nats: of what is as good as impossible


@dataclass(frozen=True)
class RuleNeeds:
    """What a rule reads besides the target's samples."""

    child_logprobs: bool = False  # log-probabilities of each drafted token, and what the request does to it
    entropy: bool = False  # of the law after each node
    hidden: HiddenNeeds = NO_HIDDEN_ROWS
    draft_rows: bool = False  # the draft model's of each drafted token


_NOTHING = RuleNeeds()


class NodeScores(NamedTuple):
    """What the target said of B trees of at most K nodes; padded like `DraftTrees`.

    Attributes:
        tokens: int64 [B, K], the target's own token after each node.
        failed: bool [B, K], where no token can be sampled: the logits are not numbers, or nothing is left of them.
        child_logprobs: float64 [B, K], log p (nats) of each node's own token after its parent, under the model's own
            law; zeros if not asked.
        entropies: float64 [B, K], nats, of p̃ (see `child_laws`); zeros if not asked.
        child_laws: float64 [B, K], log p̃ of each node's own token after its parent, under the law that the request
            asks for; -inf where it removes the token. Of a greedy request that of temperature 1. Zeros if not asked.
        is_pushed_down: bool [B, K], where a penalty or bias of the request makes the token less likely.
        hidden: by layer, [B, K, hidden] of the layers that the rule asked for, see `HiddenNeeds`.
        draft_rows: [B, K, draft hidden] what leaves the draft model's last layer at each node, before its final norm;
            no columns if not asked.
        has_draft_row: bool [B, K], of the nodes that the draft model has read.
    """

    tokens: Ints
    failed: Bools
    child_logprobs: Floats
    entropies: Floats
    child_laws: Floats
    is_pushed_down: Bools
    draft_rows: torch.Tensor
    has_draft_row: Bools
    hidden: Mapping[int, torch.Tensor] = MappingProxyType({})

    def rows(self, which: Ints) -> NodeScores:
        """Of some of the trees ([b] indices)."""
        return NodeScores(
            self.tokens[which],
            self.failed[which],
            self.child_logprobs[which],
            self.entropies[which],
            self.child_laws[which],
            self.is_pushed_down[which],
            self.draft_rows[torch.from_numpy(which).to(self.draft_rows.device)],
            self.has_draft_row[which],
            {layer: rows[torch.from_numpy(which).to(rows.device)] for layer, rows in self.hidden.items()},
        )


class Verdicts(NamedTuple):
    """What comes out of B trees.

    Attributes:
        paths: int64 [B, D] accepted nodes, the root first; behind `num_accepted[b] + 1` padding.
        num_accepted: int64 [B] drafted tokens that come out.
        next_tokens: int64 [B] the target's token after the path: "bonus" where the path ends at a leaf, "recovered"
            where the tree offered other tokens there.
        is_kept: bool [B, D] accepted nodes that `exact` would have refused.
        failed: bool [B] the target has no token after the path: the text ends with an error.
        judged: float64 [B, D] the judge's scores of accepted nodes; zeros of the root and under other rules.
    """

    paths: Ints
    num_accepted: Ints
    next_tokens: Ints
    is_kept: Bools
    failed: Bools
    judged: Floats

    def rows(self, which: Ints) -> Verdicts:
        """Of some of the trees ([b] indices)."""
        return Verdicts(
            self.paths[which],
            self.num_accepted[which],
            self.next_tokens[which],
            self.is_kept[which],
            self.failed[which],
            self.judged[which],
        )

    def emitted(self, trees: DraftTrees) -> tuple[Ints, Ints]:
        """Tokens that come out and their origins, int64 [B, D] each: `num_accepted` drafts, then the target's own."""
        tokens = self.emitted_tokens(trees)
        origins = np.zeros(tokens.shape, dtype=np.int64)
        origins[:, :-1] = int(Origin.DRAFT)
        if np.count_nonzero(self.is_kept):
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
    """Decides which drafted tokens come out. Equal rules decide alike, and of all their trees at once."""

    name: str
    is_lossless: bool

    @property
    def needs(self) -> RuleNeeds:
        """What it reads besides the target's samples."""
        return _NOTHING

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


@dataclass(frozen=True)
class TypicalRule(Rule):
    """Typical acceptance (Medusa, arXiv 2401.10774): keeps x where p̃(x) > min(epsilon, delta * exp(-H)), H being the
    entropy of p̃ in nats.

    p̃ is the law that the request asks for. At temperature 0 that law is its likeliest token, and the rule would be
    `exact` (as in Medusa's code): there p̃ is taken at temperature 1, after bias and penalties, because how sure the
    target is of its choice is what the rule asks. What the target samples is accepted in any case: refused, it
    would come out as the target's own token next. Of several paths the longest wins, then the likeliest under p̃.
    """

    epsilon: float
    delta: float

    name = "typical"
    is_lossless = False

    @property
    def needs(self) -> RuleNeeds:
        """How likely drafted tokens are, and how sure the target is."""
        return RuleNeeds(child_logprobs=True, entropy=True)

    def verdict(self, trees: DraftTrees, scores: NodeScores) -> Verdicts:
        entropies = pick(scores.entropies, trees.parents)
        bounds = np.minimum(self.epsilon, self.delta * np.exp(-entropies))
        kept = np.exp(scores.child_laws) > bounds
        return longest_paths(trees, scores, kept)


RuleMaker = Callable[[AcceptanceOptions], Rule]


def longest_paths(trees: DraftTrees, scores: NodeScores, kept: Bools) -> Verdicts:
    """The longest path of nodes that are kept ([B, K]) or hold what the target samples; of equals the likeliest.

    A node is never kept below one after which the target has no law, nor where p̃ has removed its token.
    """
    sampled = sampled_children(trees, scores)
    kept = kept & trees.exists & (scores.child_laws > -np.inf) & ~pick(scores.failed, trees.parents)
    kept[:, 0] = False
    accepted = kept | sampled
    row = np.arange(len(accepted))
    reached, depths, totals = accepted.copy(), np.zeros(kept.shape, dtype=np.int64), np.zeros(kept.shape)
    reached[:, 0] = True
    for node in range(1, kept.shape[1]):
        above = trees.parents[:, node]
        reached[:, node] &= reached[row, above]
        depths[:, node] = depths[row, above] + 1
        # What was sampled is never impossible, whatever rounding says at the edge of a nucleus.
        totals[:, node] = totals[row, above] + np.maximum(scores.child_laws[:, node], _LEAST_LOG)
    depths[~reached] = -1
    totals[depths < depths.max(axis=1)[:, None]] = -np.inf
    ends = np.where(depths == depths.max(axis=1)[:, None], totals, -np.inf).argmax(axis=1)
    on_path = np.zeros(kept.shape, dtype=np.bool_)
    while np.count_nonzero(ends):
        on_path[row, ends] = True
        ends = trees.parents[row, ends]
    on_path[:, 0] = False
    return follow(trees, scores, on_path, sampled)


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
    judged, is_kept = np.zeros(paths.shape), np.zeros(paths.shape, dtype=np.bool_)
    if sampled is not accepted:
        is_kept = ~pick(sampled_children(trees, scores) if sampled is None else sampled, paths)
        is_kept &= paths > 0
    return Verdicts(
        paths, num_accepted, scores.tokens[row, lasts], is_kept, scores.failed[row, lasts], judged
    )


EXACT = ExactRule()
RULES: Mapping[str, RuleMaker] = {
    EXACT.name: lambda _: EXACT,
    TypicalRule.name: lambda options: TypicalRule(options.epsilon, options.delta),
}
"""By name, rules as requests want them: those that need no weights. A deployment with judges has `judge`, too."""
RULE_NAMES = (*RULES, "judge")
"""All of them."""
