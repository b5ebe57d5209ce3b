"""Draft method `ngram`: look the last tokens up in the prompt and the output, propose what followed there.

The idea is prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), also transformers'
`prompt_lookup_num_tokens`. Here the occurrences are kept in an index, ranked by how far back they agree, and
enter the same tree as the proposals of other methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.sequences.tree import GrowingTree

NGRAM_METHOD = 0
_MAX_OCCURRENCES = 16  # the most recent ones are compared
_MATCH_EDGES = (2, 3, 4, 5, 7, 10, 15, 24)  # tokens


class NgramIndex:
    """Where each run of `min_match` tokens of one sequence ends; extended as the sequence grows."""

    def __init__(self, config: NgramConfig) -> None:
        self.config = config
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._num_indexed = 0

    def continuations(
        self, tokens: SequenceABC[int], path: SequenceABC[int], max_length: int
    ) -> list[tuple[int, list[int]]]:
        """(match length, tokens that followed) of earlier occurrences of the last tokens, longest match first.

        The last tokens are those of `tokens` followed by `path`, draft tokens that may come next.
        """
        self._extend(tokens)
        width = self.config.min_match
        num_known, length = len(tokens), len(tokens) + len(path)
        tail = [*tokens[max(0, num_known - self.config.max_match) :], *path]
        if length <= width or max_length < 1:
            return []
        ends = self._ends.get(tuple(tail[-width:]), [])
        ranked = sorted(
            (
                (self._match_length(tokens, tail, end), end)
                for end in ends[-_MAX_OCCURRENCES:]
                if end < length
            ),
            reverse=True,
        )
        found: list[tuple[int, list[int]]] = []
        for match, end in ranked:
            # A match that reaches the end repeats itself: its continuation goes round with the period.
            reach = [*tokens[end : end + max_length], *path]
            follow = [reach[i % len(reach)] for i in range(max_length)]
            if all(follow != other for _, other in found):
                found.append((match, follow))
            if len(found) == self.config.max_candidates:
                break
        return found

    def _extend(self, tokens: SequenceABC[int]) -> None:
        width = self.config.min_match
        for end in range(max(self._num_indexed + 1, width), len(tokens) + 1):
            self._ends.setdefault(tuple(tokens[end - width : end]), []).append(end)
        self._num_indexed = len(tokens)

    def _match_length(self, tokens: SequenceABC[int], tail: SequenceABC[int], end: int) -> int:
        length, limit = self.config.min_match, min(self.config.max_match, end, len(tail))
        while length < limit and tokens[end - 1 - length] == tail[-1 - length]:
            length += 1
        return length


def propose_ngrams(
    index: NgramIndex,
    tokens: SequenceABC[int],
    tree: GrowingTree,
    below: int,
    max_depth: int,
    estimator: AcceptanceEstimator,
) -> None:
    """Add what followed the last tokens earlier, below node `below` of the tree, whose root is `tokens[-1]`."""
    room = max_depth - tree.nodes[below].depth
    for rank, (match, follow) in enumerate(index.continuations(tokens, tree.path_tokens(below), room)):
        node = below
        for depth, token in enumerate(follow):
            # Once the tokens before it are accepted, the match is longer by as many.
            source = (NGRAM_METHOD, rank, _match_bucket(match + depth))
            node = tree.add_child(
                node, token, estimator.estimate(source, _prior(match + depth, rank)), source
            )


def _prior(match_length: int, rank: int) -> float:
    """One or two equal tokens mean little, four or five much: fitted to Spec-Bench answers of Qwen2.5-Coder 1.5B."""
    prior = 0.9 * (1.0 - math.exp(-((match_length / 4.0) ** 2)))
    return prior if rank == 0 else 0.5 * prior


def _match_bucket(length: int) -> int:
    return sum(length >= edge for edge in _MATCH_EDGES)
