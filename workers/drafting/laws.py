"""Under which law each running sequence is sampled, by slot: drafts are ranked by it, too."""

from __future__ import annotations

import numpy as np

from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sampling.context import PenaltyState
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Survivors


class SlotLaws:
    """What the law of a sequence's rows depends on besides the logits and the position. Index it by slot."""

    def __init__(self, slots: DraftedSlots) -> None:
        self._slots = slots
        self._laws = [(SamplingParams(), PenaltyState(()))] * len(slots)
        self._counting: set[int] = set()  # slots whose laws depend on their texts

    def __getitem__(self, slot: int) -> tuple[SamplingParams, PenaltyState]:
        """What the request asks for, and what its text holds so far, which is kept up where it matters."""
        return self._laws[slot]

    def start(self, sequence: Sequence) -> None:
        """A sequence begins to run in its slot."""
        params, penalties = sequence.request.sampling, PenaltyState(())
        if params.uses_context:
            penalties = PenaltyState(sequence.request.prompt_tokens)
            for token in sequence.tokens[len(sequence.request.prompt_tokens) :]:
                penalties.add(token)
        self._laws[sequence.slot] = params, penalties
        self._counting.discard(sequence.slot)
        if params.uses_context:
            self._counting.add(sequence.slot)

    def rerooted(self, survivors: Survivors) -> None:
        """Tokens came out, one for each node of these paths."""
        if self._counting.isdisjoint(survivors.slots.tolist()):
            return
        for slot, path in zip(survivors.slots.tolist(), survivors.paths, strict=True):
            if slot in self._counting:
                for token in self._slots.sequence(slot).tokens[-np.count_nonzero(path) :]:
                    self._laws[slot][1].add(token)
