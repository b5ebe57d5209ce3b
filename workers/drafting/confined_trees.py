"""Growing trees into which only such tokens go as the text may go on with, whatever methods propose."""

from __future__ import annotations

import numpy as np

from outrider.workers.sampling.confinement import NO_WORDS, Confinement
from outrider.workers.sampling.grammars import Words
from outrider.workers.sequences.tree import Floats, GrowingTrees, Ints, Survivors


class ConfinedTrees(GrowingTrees):
    """The trees of all slots, those confined whose requests say so."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        super().__init__(num_slots, capacity)
        self._confinements: dict[int, Confinement] = {}  # by slot, of what is known, the root included

    def start(self, slot: int, token: int, position: int) -> None:
        """A tree of its root alone, in which anything may grow."""
        super().start(slot, token, position)
        self._confinements.pop(slot, None)

    def confine(self, slot: int, confinement: Confinement) -> None:
        """From now on only what may follow grows in this tree, which is its root alone. It is told what comes out."""
        self._confinements[slot] = confinement

    def path(self, slot: int, node: int) -> list[int]:
        """The tokens from below the root down to a node."""
        tokens = []
        while node:
            tokens.append(int(self.tokens[slot, node]))
            node = int(self.parents[slot, node])
        return tokens[::-1]

    def words(self, slot: int, paths: list[list[int]]) -> Words:
        """The tokens that may follow each of these paths, see `Confinement.words`."""
        confinement = self._confinements.get(slot)
        return NO_WORDS if confinement is None else confinement.words(paths)

    def add_children(
        self, slots: Ints, parents: Ints, tokens: Ints, acceptances: Floats, sources: Ints
    ) -> Floats:
        """Those that may follow; the value of the others is 0."""
        if not self._confinements:
            return super().add_children(slots, parents, tokens, acceptances, sources)
        may_follow = self._num_allowed(slots, parents, tokens[:, None], np.ones_like(slots)) > 0
        values = np.zeros(len(slots))
        values[may_follow] = super().add_children(
            slots[may_follow],
            parents[may_follow],
            tokens[may_follow],
            acceptances[may_follow],
            sources[may_follow],
        )
        return values

    def add_chains(
        self,
        slots: Ints,
        below: Ints,
        tokens: Ints,
        lengths: Ints,
        acceptances: Floats,
        sources: Ints,
    ) -> None:
        """As far as they may follow."""
        if self._confinements:
            lengths = self._num_allowed(slots, below, tokens, lengths)
        super().add_chains(slots, below, tokens, lengths, acceptances, sources)

    def reroot(self, slots: Ints, lasts: Ints, next_tokens: Ints, num_emitted: Ints) -> Survivors:
        """What came out is known from now on."""
        for slot, last, token in zip(slots.tolist(), lasts.tolist(), next_tokens.tolist(), strict=True):
            if slot in self._confinements:
                self._confinements[slot].advance([*self.path(slot, last), token])
        return super().reroot(slots, lasts, next_tokens, num_emitted)

    def _num_allowed(self, slots: Ints, below: Ints, tokens: Ints, lengths: Ints) -> Ints:
        """[C]: how many of the first `lengths` ([C]) tokens of chains ([C, L]) may follow the nodes `below` ([C])."""
        allowed = lengths.copy()
        for index, slot in enumerate(slots.tolist()):
            confinement = self._confinements.get(slot)
            if confinement is not None:
                path, chain = self.path(slot, int(below[index])), tokens[index, : lengths[index]].tolist()
                allowed[index] = confinement.num_allowed(path, chain)
        return allowed
