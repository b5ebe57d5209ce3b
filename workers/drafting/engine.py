"""All draft methods of a run behind one face: trees are started, grown, cut and re-rooted here.

Each sequence has one growing tree into which every method puts its proposals. Lookup is free and fills the
tree at once; the draft model grows it step by step, as long as the caller finds that another step pays.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Protocol

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.ngram import NgramIndex, propose_ngrams
from outrider.workers.rounds.sequence import Sequence
from outrider.workers.rounds.verify import Verdict


class StepwiseDrafter(Protocol):
    """A method that grows trees by forwards of its own: a draft model, or a script in a test."""

    def start(self, sequence: Sequence) -> None:
        """A sequence begins to run."""

    def step(self, sequences: SequenceABC[Sequence]) -> bool:
        """One forward over the trees of these sequences; False when nothing is left to expand."""

    def expected_gain(self, sequences: SequenceABC[Sequence]) -> float:
        """Expected accepted tokens that the next `step` adds; 0 when nothing is left to expand."""

    def survival(self, sequences: SequenceABC[Sequence]) -> float:
        """Probability that the node which the next `step` expands first is accepted; 0 when there is none."""

    def read_prompts(self, sequences: SequenceABC[Sequence]) -> None:
        """Read one chunk of what these sequences' caches lack."""

    def rerooted(self, sequence: Sequence, path: list[int], survivors: dict[int, int]) -> None:
        """Follow a verdict: `path` are the old tree's nodes that came out, root first; `survivors` maps old
        nodes to new ones and is empty when the tree was started afresh."""

    def finish(self, sequence: Sequence) -> None:
        """The sequence is done or gives its memory back."""


class DraftEngine:
    """The trees of all running sequences."""

    def __init__(self, ngram: NgramConfig) -> None:
        self.estimator = AcceptanceEstimator()
        self._ngram = ngram
        self._indexes: dict[str, NgramIndex] = {}
        self._stepwise: list[StepwiseDrafter] = []

    def add(self, drafter: StepwiseDrafter) -> None:
        """Let a draft model take part; call before any sequence starts."""
        self._stepwise.append(drafter)

    def start(self, sequence: Sequence) -> None:
        """A sequence begins to run."""
        if sequence.id in self._indexes:  # it was here before its pages were taken away
            return
        self._indexes[sequence.id] = NgramIndex(self._ngram)
        for drafter in self._stepwise:
            drafter.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A sequence is done. One that was never started is ignored."""
        if self._indexes.pop(sequence.id, None) is None:
            return
        for drafter in self._stepwise:
            drafter.finish(sequence)

    def look_up(self, sequences: SequenceABC[Sequence]) -> None:
        """Put the proposals that cost nothing into the trees."""
        for sequence in sequences:
            if "ngram" in sequence.request.draft.methods:
                propose_ngrams(
                    self._indexes[sequence.id],
                    sequence.tokens,
                    sequence.tree,
                    min(sequence.request.draft.max_depth, sequence.num_remaining - 1),
                    self.estimator,
                )

    def expected_gain(self, sequences: SequenceABC[Sequence]) -> float:
        """Expected accepted tokens that one more step adds."""
        return sum(d.expected_gain(drafted_by_model(sequences)) for d in self._stepwise)

    def survival(self, sequences: SequenceABC[Sequence]) -> float:
        """Probability that one more step, taken before the verdict is known, is of use after it."""
        return max((d.survival(drafted_by_model(sequences)) for d in self._stepwise), default=0.0)

    def step(self, sequences: SequenceABC[Sequence]) -> bool:
        """One step of the draft model on these sequences' trees; False when there was nothing to do."""
        progress = [drafter.step(drafted_by_model(sequences)) for drafter in self._stepwise]
        return any(progress)

    def read_prompts(self, sequences: SequenceABC[Sequence]) -> None:
        """Read one chunk of each prompt into the draft model's cache."""
        for drafter in self._stepwise:
            drafter.read_prompts(drafted_by_model(sequences))

    def settle(self, sequence: Sequence, verdict: Verdict) -> None:
        """Learn from a verdict and re-root the sequence's tree below the tokens that came out.

        The sequence's `tokens` have been extended already; `sent_tree` is what the verdict is about.
        """
        self._learn(sequence, verdict)
        tree, sent = sequence.tree, sequence.sent_tree
        path = [sent.growing_nodes[node] for node in verdict.path]
        survivors = tree.reroot(verdict.emitted(sent))
        for drafter in self._stepwise:
            drafter.rerooted(sequence, path, survivors)

    def _learn(self, sequence: Sequence, verdict: Verdict) -> None:
        sent, path = sequence.sent_tree, set(verdict.path)
        for node in range(1, len(sent.tokens)):
            if sent.parents[node] in path:
                source = sequence.tree.nodes[sent.growing_nodes[node]].source
                self.estimator.observe(source, node in path)


def drafted_by_model(sequences: SequenceABC[Sequence]) -> list[Sequence]:
    """Those whose request asks for the draft model."""
    return [s for s in sequences if "model" in s.request.draft.methods and s.request.draft.max_nodes > 0]
