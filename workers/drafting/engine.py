"""All draft methods of a run behind one face: trees are started, grown, cut and re-rooted here.

Each sequence has one growing tree into which every method puts its proposals. Lookup is free and fills the
tree at once; the draft model grows it step by step, as long as the caller finds that another step pays.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Protocol

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.ngram import NgramIndex, propose_ngrams
from outrider.workers.sequences.rules import Verdict
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import GrowingTree


@dataclass(frozen=True)
class StepForecast:
    """What the next step of the draft model would do.

    Attributes:
        gains: expected accepted tokens, in this round's trees, of each proposal it makes, descending; empty when
            nothing is left to expand.
        num_rows: rows of its forward, tokens included that the model has not read yet.
    """

    gains: list[float]
    num_rows: int


class StepwiseDrafter(Protocol):
    """A method that grows trees by forwards of its own: a draft model, or a script in a test."""

    def start(self, sequence: Sequence) -> None:
        """A sequence begins to run."""

    def step(self, sequences: SequenceABC[Sequence]) -> bool:
        """One forward over the trees of these sequences; False when nothing is left to expand."""

    def forecast(self, sequences: SequenceABC[Sequence]) -> StepForecast:
        """What the next `step` over these sequences would do."""

    def survival(self, sequences: SequenceABC[Sequence]) -> float:
        """Probability that the next `step`, taken while these trees are verified, spares one afterwards.

        A node counts with its value if it is not in the tree that is verified. Those that are spare nothing:
        the verdict makes one of their children the root, or a node further down, and that has to be expanded.
        """

    def root_gains(self, sequences: SequenceABC[Sequence]) -> list[float]:
        """The gains of a step if these sequences' trees were only roots: what was seen so far, but no less than
        what is assumed at first, so that a hard text does not end drafting for those after it."""

    def unread(self, sequences: SequenceABC[Sequence]) -> list[int]:
        """How many tokens `read_prompts` has to read before steps can follow, of each sequence where it has to."""

    def read_prompts(self, sequences: SequenceABC[Sequence]) -> int:
        """Read one chunk of what these sequences' caches lack; returns its tokens."""

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
        """Put the proposals that cost nothing into the trees: below the root and below every leaf."""
        for sequence in sequences:
            if "ngram" not in sequence.request.draft.methods:
                continue
            index, tree = self._indexes[sequence.id], sequence.tree
            max_depth = min(sequence.request.draft.max_depth, sequence.num_remaining - 1)
            leaves = [n for n in range(1, len(tree)) if not tree.nodes[n].children]
            for node in [0, *leaves]:
                if tree.nodes[node].depth < max_depth:
                    propose_ngrams(index, sequence.tokens, tree, node, max_depth, self.estimator)

    def forecast(self, sequences: SequenceABC[Sequence]) -> StepForecast:
        """What one more step over these sequences would do."""
        forecasts = [drafter.forecast(drafted_by_model(sequences)) for drafter in self._stepwise]
        gains = sorted((gain for forecast in forecasts for gain in forecast.gains), reverse=True)
        return StepForecast(gains, sum(forecast.num_rows for forecast in forecasts))

    def survival(self, sequences: SequenceABC[Sequence]) -> float:
        """Probability that one more step, taken before the verdict is known, spares one after it."""
        return max((d.survival(drafted_by_model(sequences)) for d in self._stepwise), default=0.0)

    def root_gains(self, sequences: SequenceABC[Sequence]) -> list[float]:
        """The gains of a step if these sequences' trees were only roots, descending."""
        drafted = drafted_by_model(sequences)
        return sorted((gain for d in self._stepwise for gain in d.root_gains(drafted)), reverse=True)

    def step(self, sequences: SequenceABC[Sequence]) -> bool:
        """One step of the draft model on these sequences' trees; False when there was nothing to do."""
        progress = [drafter.step(drafted_by_model(sequences)) for drafter in self._stepwise]
        if any(progress):
            self.look_up(sequences)
        return any(progress)

    def unread(self, sequences: SequenceABC[Sequence]) -> list[int]:
        """How many tokens `read_prompts` has to read, of each sequence in which the draft model lags behind."""
        return [n for drafter in self._stepwise for n in drafter.unread(drafted_by_model(sequences))]

    def read_prompts(self, sequences: SequenceABC[Sequence]) -> int:
        """Read one chunk of the prompts into the draft model's cache; returns its tokens."""
        return sum(drafter.read_prompts(drafted_by_model(sequences)) for drafter in self._stepwise)

    def settle(self, sequence: Sequence, verdict: Verdict) -> None:
        """Learn from a verdict and re-root the sequence's tree below the tokens that came out.

        The sequence's `tokens` have been extended already; `sent_tree` is what the verdict is about.
        """
        tree, sent = sequence.tree, sequence.sent_tree
        path = [sent.growing_nodes[node] for node in verdict.path]
        emitted = verdict.emitted(sent)
        self._learn(tree, path, emitted)
        survivors = tree.reroot(emitted)
        for drafter in self._stepwise:
            drafter.rerooted(sequence, path, survivors)

    def _learn(self, tree: GrowingTree, path: list[int], emitted: list[int]) -> None:
        """Every proposal after a node of the path met its answer, also one that was not worth sending.

        Learning from those alone that are sent, a method that once failed would never be tried again.
        """
        for node, token in zip(path, emitted, strict=True):
            for proposed, child in tree.nodes[node].children.items():
                self.estimator.observe(tree.nodes[child].source, proposed == token)


def drafted_by_model(sequences: SequenceABC[Sequence]) -> list[Sequence]:
    """Those whose request asks for the draft model."""
    return [s for s in sequences if "model" in s.request.draft.methods and s.request.draft.max_nodes > 0]
