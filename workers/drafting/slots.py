"""What drafting knows of the running sequences, by slot: their trees, limits and last tokens."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from outrider.workers.drafting.confined_trees import ConfinedTrees
from outrider.workers.sampling.confinement import Confinement
from outrider.workers.sampling.grammars import NO_GRAMMARS, Grammars
from outrider.workers.sequences.rules import RULE_NAMES
from outrider.workers.sequences.sequence import AcceptanceOptions, Sequence
from outrider.workers.sequences.tree import Bools, Ints

_NODES_PER_SENT_NODE = 8  # a tree grows on while a cut of it is verified, and has more than is worth sending
_MIN_NODES = 64
_TYPICAL_EDGES = (0.1, 0.2, 0.4)  # of epsilon
_JUDGE_EDGES = (0.6, 0.8, 0.9, 0.97)  # of the threshold


def tree_capacity(max_nodes: int) -> int:
    """Nodes that there is room for in the tree of a sequence, of which `max_nodes` at most are in a round."""
    return max(_MIN_NODES, _NODES_PER_SENT_NODE * max_nodes)


class Loosenesses:
    """How loosely requests have their drafts accepted, in a few kinds: by rule, a lossy one by its own measure, too.

    What is seen of one kind says little of another: a judge keeps far more above 0.5 than above 0.97.
    """

    def __init__(self, rule_names: tuple[str, ...]) -> None:
        """rule_names: of the rules that requests may ask for."""
        edges = {"typical": _TYPICAL_EDGES, "judge": _JUDGE_EDGES}
        self._edges = [edges.get(name, ()) for name in rule_names]
        self._places = {name: place for place, name in enumerate(rule_names)}
        counts = [len(found) + 1 for found in self._edges]
        self._firsts = [sum(counts[:place]) for place in range(len(counts))]
        self._num = sum(counts)

    def __len__(self) -> int:
        return self._num

    def kind_of(self, acceptance: AcceptanceOptions) -> int:
        """From 0 to `len(self)` - 1."""
        place = self._places[acceptance.rule]
        measure = acceptance.epsilon if acceptance.rule == "typical" else acceptance.threshold
        return self._firsts[place] + bisect_right(self._edges[place], measure)


class DraftedSlots:
    """The sequences that run, a row per slot; methods read it, the engine keeps it.

    Attributes:
        trees: where methods put their proposals.
        sequences: by slot; what is left of an ended sequence means nothing.
        is_greedy: bool [S], temperature 0.
        rules: int64 [S], by which rule, and how loosely, drafted tokens are accepted: a kind of `Loosenesses`.
        laws: int64 [S], that and the temperature in one: what is seen of one law says little of another. 2 * rule,
            and 1 more of greedy requests.
        max_nodes, max_depth: int64 [S], of the request: drafted nodes in a round, and on one path.
        num_remaining: int64 [S], tokens that may still be emitted.
        recent: int64 [S, T], the last tokens, the newest last; zeros before the text begins.
        num_tokens: int64 [S], prompt and output.
    """

    def __init__(
        self,
        num_slots: int,
        max_nodes: int,
        num_recent: int,
        rule_names: tuple[str, ...] = RULE_NAMES,
        grammars: Grammars = NO_GRAMMARS,
    ) -> None:
        """max_nodes: drafted nodes of a sequence in a round, at most; num_recent: T; rule_names: of the rules that
        requests may ask for; grammars: over the target's tokens."""
        self._grammars = grammars
        self._loosenesses = Loosenesses(rule_names)
        self.num_rules = len(self._loosenesses)
        self.num_laws = 2 * self.num_rules
        self.rules, self.laws = (np.zeros(num_slots, dtype=np.int64) for _ in range(2))
        self.trees = ConfinedTrees(num_slots, tree_capacity(max_nodes))
        self.sequences: list[Sequence | None] = [None] * num_slots
        self.is_greedy = np.zeros(num_slots, dtype=np.bool_)
        self.max_nodes, self.max_depth, self.num_remaining, self.num_tokens = (
            np.zeros(num_slots, dtype=np.int64) for _ in range(4)
        )
        self._round_depths, self._growth_depths = (np.zeros(num_slots, dtype=np.int64) for _ in range(2))
        self.recent = np.zeros((num_slots, num_recent), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    def start(self, sequence: Sequence) -> None:
        """The sequence runs in its slot from now on."""
        slot, draft = sequence.slot, sequence.request.draft
        self.sequences[slot] = sequence
        self.is_greedy[slot] = sequence.request.sampling.is_greedy
        self.laws[slot] = self.law_of(sequence)
        self.rules[slot] = self.laws[slot] // 2
        self.max_nodes[slot], self.max_depth[slot] = draft.max_nodes, draft.max_depth
        self.recent[slot] = 0
        last = sequence.tokens[-self.recent.shape[1] :]
        self.recent[slot, -len(last) :] = last
        self._count(sequence)
        self.trees.start(slot, sequence.tokens[-1], len(sequence.tokens) - 1)
        sampling = sequence.request.sampling
        if sampling.is_confined and draft.max_nodes:
            confinement = Confinement(sampling, self._grammars)
            confinement.advance(sequence.tokens[len(sequence.request.prompt_tokens) :])
            self.trees.confine(slot, confinement)

    def extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """`tokens` have come out; the sequence has them already."""
        last = tokens[-self.recent.shape[1] :]
        recent = self.recent[sequence.slot]
        recent[: -len(last)] = recent[len(last) :].copy()
        recent[-len(last) :] = last
        self._count(sequence)

    def law_of(self, sequence: Sequence) -> int:
        """See `laws`."""
        request = sequence.request
        return 2 * self._loosenesses.kind_of(request.acceptance) + request.sampling.is_greedy

    def sequence(self, slot: int) -> Sequence:
        """Who runs in this slot."""
        sequence = self.sequences[slot]
        assert sequence is not None
        return sequence

    def round_depths(self, slots: Ints) -> Ints:
        """[B]: the deepest node that a round may verify: it emits one token more than it accepts, so the last
        token needs no draft."""
        return self._round_depths[slots]

    def growth_depths(self, slots: Ints) -> Ints:
        """[B]: the deepest node worth having: a path of this round, the token after it, a path of the next."""
        return self._growth_depths[slots]

    def open_nodes(self, slots: Ints, depths: Ints) -> Bools:
        """[B, width]: nodes above these depths, whose children may be proposed."""
        width = self.trees.width(slots)
        return self.trees.exists(slots, width) & (self.trees.depths[slots, :width] < depths[:, None])

    def _count(self, sequence: Sequence) -> None:
        slot, max_depth, num_remaining = (
            sequence.slot,
            sequence.request.draft.max_depth,
            sequence.num_remaining,
        )
        self.num_remaining[slot] = num_remaining
        self.num_tokens[slot] = len(sequence.tokens)
        self._round_depths[slot] = min(max_depth, num_remaining - 1)
        self._growth_depths[slot] = min(2 * max_depth + 1, num_remaining - 1)
