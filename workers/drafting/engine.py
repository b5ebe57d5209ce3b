"""All draft methods of a run behind one face: trees are started, grown, cut and re-rooted here.

Each sequence has one growing tree into which every method that its request names puts proposals. Free methods
fill it at once and again after every step of another; the others take a step where the caller finds that it pays.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np
import torch

from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.method import DraftMethod, Forecast, Verified
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.rules import Verdicts
from outrider.workers.sequences.segments import pick
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Bools, DraftTrees, Floats, Ints


class DraftEngine:
    """The methods of a run and the trees of all running sequences."""

    def __init__(self, slots: DraftedSlots) -> None:
        self.slots = slots
        self.trees = slots.trees
        self.estimator = AcceptanceEstimator(slots.num_rules)
        self.methods: list[DraftMethod] = []
        self._reading: list[DraftMethod] = []  # the target's hidden rows
        self._uses: dict[str, Bools] = {}  # by method, [S]: whether the slot's request names it

    def add(self, method: DraftMethod) -> None:
        """Let a method take part; call before any sequence starts."""
        assert method.name not in self._uses
        self.methods.append(method)
        if method.needs.layers:
            self._reading.append(method)
        self._uses[method.name] = np.zeros(len(self.slots), dtype=np.bool_)

    def close(self) -> None:
        """There will be no further call."""
        for method in self.methods:
            method.close()

    def prefix_kept(self, sequence: Sequence) -> int:
        """The most tokens that may be taken from shared pages: what every method of the request still has of them."""
        kept = [m.prefix_kept(sequence) for m in self.methods if self._is_asked(m, sequence)]
        return min(kept, default=len(sequence.tokens))

    def hidden_needs(self, sequence: Sequence) -> list[HiddenNeeds]:
        """What this sequence's methods read of the target's hidden rows."""
        return [m.needs for m in self._reading if self._uses[m.name][sequence.slot]]

    def needs(self) -> list[HiddenNeeds]:
        """What all methods read of the target's hidden rows."""
        return [method.needs for method in self.methods]

    def start(self, sequence: Sequence) -> None:
        """A sequence begins to run in its slot."""
        self.slots.start(sequence)
        for method in self.methods:
            self._uses[method.name][sequence.slot] = self._is_asked(method, sequence)
            if self._is_asked(method, sequence):
                method.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A running sequence leaves its slot."""
        for method in self.methods:
            if self._uses[method.name][sequence.slot]:
                method.finish(sequence)
                self._uses[method.name][sequence.slot] = False

    def look_up(self, slots: Ints) -> None:
        """Put the proposals that cost nothing into the trees."""
        for method in self.methods:
            if method.is_free:
                method.expand(self._using(method, slots))

    def forecasts(self, slots: Ints) -> list[tuple[DraftMethod, Forecast]]:
        """What one more step over these slots would do, of every method that has something left to do."""
        found = [
            (method, method.forecast(self._using(method, slots)))
            for method in self.methods
            if not method.is_free
        ]
        return [(method, forecast) for method, forecast in found if forecast.num_rows]

    def expand(self, method: DraftMethod, slots: Ints, num_further: int = 0) -> int:
        """One step of a method on the trees of these slots, and up to so many right behind it; returns how many were
        taken, 0 when there was nothing to do."""
        using = self._using(method, slots)
        num_steps = method.expand_levels(using, num_further) if num_further else int(method.expand(using))
        if not num_steps:
            return 0
        self.look_up(slots)
        return num_steps

    def survival(self, method: DraftMethod, slots: Ints, sent: DraftTrees) -> float:
        """Probability that a step of the method, taken before the verdict about `sent` ([B] rows) is known, spares
        one after it."""
        uses = self._uses[method.name][slots]
        return method.survival(slots[uses], sent.rows(np.flatnonzero(uses))) if uses.any() else 0.0

    def root_gains(self, method: DraftMethod, sequences: SequenceABC[Sequence]) -> Floats:
        """The gains of a method's step if these sequences' trees were only roots, descending; waiting ones, too."""
        laws = [self.slots.law_of(s) for s in sequences if self._is_asked(method, s)]
        return np.sort(method.root_gains(np.array(laws, dtype=np.int64)))[::-1]

    def unread(self, method: DraftMethod, slots: Ints) -> Ints:
        """How many tokens `read` has to read, of each sequence in which the method lags behind."""
        return method.unread(self._using(method, slots))

    def read(self, method: DraftMethod, slots: Ints) -> int:
        """Let the method read one chunk of what it lacks; returns its tokens."""
        return method.read(self._using(method, slots))

    @property
    def observes(self) -> bool:
        """Whether any method does something in `observe`."""
        return any(type(method).observe is not DraftMethod.observe for method in self.methods)

    def observe(self, verified: Verified) -> None:
        """A round was verified: every method sees its own sequences' part of it."""
        for method in self.methods:
            uses = self._uses[method.name]
            steps = tuple(step for step in verified.steps if uses[step.sequence.slot])
            if steps:
                method.observe(Verified(steps, verified.hidden))

    def node_rows(self, slots: Ints, nodes: Ints) -> tuple[torch.Tensor, Bools]:
        """Of the method that has rows at nodes, see `DraftMethod.node_rows`; there is one where a judge asks."""
        (method,) = (method for method in self.methods if method.has_node_rows)
        return method.node_rows(slots, nodes)

    def settle(self, slots: Ints, trees: DraftTrees, verdicts: Verdicts) -> None:
        """Learn from verdicts and re-root these slots' trees below the tokens that came out.

        trees, verdicts: a row per slot; all tokens of the verdicts came out.
        """
        if not len(slots):
            return
        row = np.arange(len(slots))
        lasts = trees.growing_nodes[row, verdicts.paths[row, verdicts.num_accepted]]
        self._learn(slots, trees, verdicts)
        survivors = self.trees.reroot(slots, lasts, verdicts.next_tokens, verdicts.num_accepted + 1)
        for method in self.methods:
            uses = self._uses[method.name][slots]
            num_using = np.count_nonzero(uses)
            if num_using:
                method.rerooted(
                    survivors if num_using == len(slots) else survivors.rows(np.flatnonzero(uses))
                )

    def _learn(self, slots: Ints, trees: DraftTrees, verdicts: Verdicts) -> None:
        """Every proposal after a node of the path met its answer, also one that was not worth sending.

        Learning from those alone that are sent, a method that once failed would never be tried again.
        """
        width = self.trees.width(slots)
        path = pick(trees.growing_nodes, verdicts.paths)  # [B, D]
        on_path = np.arange(path.shape[1]) <= verdicts.num_accepted[:, None]
        firsts = (np.arange(len(slots)) * width)[:, None]
        places = (firsts + path)[on_path]
        answered = np.zeros(len(slots) * width, dtype=np.bool_)
        answer = np.zeros(len(slots) * width, dtype=np.int64)
        answered[places] = True
        answer[places] = verdicts.emitted_tokens(trees)[on_path]
        parents = firsts + self.trees.parents[slots, :width]
        met = answered[parents]
        met &= self.trees.exists(slots, width)
        met[:, 0] = False
        nodes = (slots * self.trees.capacity)[:, None] + np.arange(width)
        nodes, asked = nodes[met], answer[parents[met]]
        accepted = self.trees.tokens.reshape(-1)[nodes] == asked
        rules = self.slots.rules[nodes // self.trees.capacity]
        self.estimator.observe(self.trees.sources.reshape(-1)[nodes], accepted, rules)

    def _using(self, method: DraftMethod, slots: Ints) -> Ints:
        return slots[self._uses[method.name][slots]]

    @staticmethod
    def _is_asked(method: DraftMethod, sequence: Sequence) -> bool:
        draft = sequence.request.draft
        return method.name in draft.methods and draft.max_nodes > 0
