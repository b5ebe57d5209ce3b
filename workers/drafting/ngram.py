"""Draft method `ngram`: look the last tokens up in the prompt and the output, propose what followed there.

The idea is prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), also transformers'
`prompt_lookup_num_tokens`. Here the occurrences are kept in an index, ranked by how far back they agree, and
enter the same tree as the proposals of other methods.
"""

from __future__ import annotations

import numpy as np

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.method import DraftMethod, MethodContext, Verified
from outrider.workers.drafting.ngram_table import NgramTable
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Floats, Ints, Survivors

_MATCH_EDGES = np.array((2, 3, 4, 5, 7, 10, 15, 24))  # tokens


class NgramMethod(DraftMethod):
    """Proposes at once what costs nothing: below the roots, and below whatever other methods proposed last."""

    name = "ngram"
    is_free = True

    def __init__(self, slots: DraftedSlots, estimator: AcceptanceEstimator, config: NgramConfig) -> None:
        super().__init__(slots, estimator)
        assert slots.recent.shape[1] >= config.max_match  # and as long as the longest path of a round
        self._config = config
        self._table = NgramTable(config, len(slots))
        self._num_kinds = len(_MATCH_EDGES) + 1
        self._first_source = estimator.reserve(config.max_candidates * self._num_kinds)
        self._num_indexed = np.zeros(len(slots), dtype=np.int64)  # tokens
        self._num_looked_up = np.zeros(len(slots), dtype=np.int64)  # nodes, the oldest ones

    @classmethod
    def build(cls, context: MethodContext) -> NgramMethod:
        """From `draft.ngram`."""
        return cls(context.slots, context.estimator, context.config.draft.ngram)

    def start(self, sequence: Sequence) -> None:
        """Index the prompt."""
        self._table.start(sequence.slot, np.array(sequence.tokens))
        self._num_indexed[sequence.slot] = len(sequence.tokens)
        self._num_looked_up[sequence.slot] = 0

    def finish(self, sequence: Sequence) -> None:
        """Drop the index."""
        self._table.finish(sequence.slot)

    def observe(self, verified: Verified) -> None:
        """Index what came out."""
        slots, counts, tokens = [], [], []
        for step in verified.steps:
            slot = step.sequence.slot
            new = step.sequence.tokens[self._num_indexed[slot] :]
            if new:
                slots.append(slot)
                counts.append(len(new))
                tokens += new
        if slots:
            self._num_indexed[slots] += counts
            self._table.extend(np.array(slots), np.array(counts), np.array(tokens))

    def rerooted(self, survivors: Survivors) -> None:
        """The root is another one; its survivors were looked up before."""
        self._num_looked_up[survivors.slots] = 0

    def expand(self, slots: Ints) -> bool:
        """Add what followed the last tokens earlier, below the root and leaves that were not looked up yet."""
        depths = self.slots.round_depths(slots)
        is_open = self.slots.open_nodes(slots, depths)
        width = is_open.shape[1]
        columns = np.arange(width)
        is_leaf = self.trees.child_mass[slots, :width] == 0.0
        is_open &= (is_leaf & (columns >= self._num_looked_up[slots][:, None])) | (
            (columns == 0) & (self._num_looked_up[slots] == 0)[:, None]
        )
        owners, nodes = np.nonzero(is_open)
        if not len(nodes):
            return False
        owner_slots = slots[owners]
        room = depths[owners] - self.trees.depths[owner_slots, nodes]
        path_lengths = self.trees.depths[owner_slots, nodes]
        recent = self.slots.recent[owner_slots]
        tails = self.trees.tails(owner_slots, nodes, recent)
        lengths = np.minimum(self.slots.num_tokens[owner_slots] + path_lengths, recent.shape[1])
        found = self._table.look_up(owner_slots, tails, lengths, path_lengths, room)
        for rank in range(self._config.max_candidates):
            hits = np.flatnonzero(found.match_lengths[:, rank])
            if len(hits):
                tokens = found.tokens[hits, rank]
                rules = self.slots.rules[owner_slots[hits]]
                acceptances, sources = self._estimates(
                    found.match_lengths[hits, rank], rank, tokens.shape[1], rules
                )
                self.trees.add_chains(
                    owner_slots[hits], nodes[hits], tokens, room[hits], acceptances, sources
                )
        self._num_looked_up[slots] = self.trees.num_nodes[slots]
        return bool(found.match_lengths.any())

    def _estimates(self, matches: Ints, rank: int, length: int, rules: Ints) -> tuple[Floats, Ints]:
        """Acceptances and sources, [C, length] each, along the continuations of matches ([C] tokens) of a rank.

        rules: [C], of their sequences.
        """
        # Once the tokens before it are accepted, the match is longer by as many.
        lengths = matches[:, None] + np.arange(length)
        # One or two equal tokens mean little, four or five much: fitted to Spec-Bench answers of Qwen2.5-Coder 1.5B.
        priors = 0.9 * (1.0 - np.exp(-((lengths / 4.0) ** 2))) * (1.0 if rank == 0 else 0.5)
        buckets = np.searchsorted(_MATCH_EDGES, lengths, side="right")
        sources = self._first_source + rank * self._num_kinds + buckets
        return self.estimator.estimate(sources, priors, rules[:, None]), sources
