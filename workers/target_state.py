"""What a target rank remembers of the sequences in its slots, and the rows it computes for them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

import numpy as np
import torch

from outrider.workers.link.messages import Draft, SequenceStart, SequenceStep
from outrider.workers.model.batch import SequenceRows
from outrider.workers.sampling.context import PenaltyState, RowContext
from outrider.workers.sequences.params import SamplingParams


@dataclass
class SlotState:
    """One sequence as the target knows it."""

    sampling: SamplingParams
    prompt_length: int
    tokens: list[int] = field(default_factory=list)  # of the committed KV rows
    pages: list[int] = field(default_factory=list)
    penalties: PenaltyState = field(default_factory=lambda: PenaltyState(()))
    num_counted: int = 0  # tokens that `penalties` knows


class TargetSequences:
    """All slots of a rank. Every rank applies the same messages, so all ranks hold the same state.

    Which token each cache row was computed from is kept beside the cache: a sequence that takes shared pages
    learns its tokens from them, and they need not travel again.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._row_tokens = np.zeros(num_pages * page_size, dtype=np.int64)
        self._slots: dict[int, SlotState] = {}

    def apply(self, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        """Free and fill slots, hand out pages, accept last round's paths.

        Returns source and target cache slots (int64 [M] each) of the rows that have to move.
        """
        for slot in draft.released_slots:
            del self._slots[slot]
        for start in draft.starts:
            assert start.slot not in self._slots
            self._slots[start.slot] = SlotState(start.sampling, start.prompt_length)
        moves: list[np.ndarray] = []
        for step in draft.steps:
            state = self._slots[step.slot]
            moves.append(self._accept(state, step.accepted))
            state.pages += step.new_pages
        for start in draft.starts:
            self._adopt_shared(start)
        both = np.concatenate(moves, axis=1) if moves else np.zeros((2, 0), dtype=np.int64)
        return torch.from_numpy(both[0].copy()), torch.from_numpy(both[1].copy())

    def rows(self, step: SequenceStep) -> SequenceRows:
        """The step's nodes as rows of a forward, written behind the committed ones."""
        state = self._slots[step.slot]
        context_len = len(state.tokens)
        cache_slots = self._cache_slots(state, np.arange(context_len, context_len + len(step.tokens)))
        self._row_tokens[cache_slots] = step.tokens
        return SequenceRows(state.pages, context_len, step.parents, 0, step.tokens)

    def contexts(self, step: SequenceStep) -> list[RowContext]:
        """What the law of each sampled node depends on, besides its logits."""
        state, first = self._slots[step.slot], step.first_sampled
        if first == len(step.tokens):
            return []
        context_len, uses_context = len(state.tokens), state.sampling.uses_context
        if uses_context:
            self._count_tokens(state, step.tokens[: first + 1])
        depths = list(range(first + 1))
        paths: list[tuple[int, ...]] = [()] * (first + 1)
        if uses_context:
            paths[first] = self._uncounted(state, step.tokens[: first + 1])
        for node in range(first + 1, len(step.tokens)):
            depths.append(depths[step.parents[node]] + 1)
            paths.append((*paths[step.parents[node]], step.tokens[node]) if uses_context else ())
        return [
            RowContext(state.sampling, context_len + depths[node] + 1, state.penalties, paths[node])
            for node in range(first, len(step.tokens))
        ]

    def _accept(self, state: SlotState, accepted: SequenceABC[int]) -> np.ndarray:
        context_len = len(state.tokens)
        sources = self._cache_slots(state, context_len + np.array(accepted, dtype=np.int64))
        targets = self._cache_slots(state, context_len + np.arange(len(accepted)))
        self._row_tokens[targets] = self._row_tokens[sources]
        state.tokens += self._row_tokens[targets].tolist()
        moving = sources != targets
        return np.stack([sources[moving], targets[moving]])

    def _adopt_shared(self, start: SequenceStart) -> None:
        state = self._slots[start.slot]
        rows = self._cache_slots(state, np.arange(start.num_shared_tokens))
        state.tokens = self._row_tokens[rows].tolist()

    def _cache_slots(self, state: SlotState, rows: np.ndarray) -> np.ndarray:
        pages = np.array(state.pages, dtype=np.int64)
        return pages[rows // self._page_size] * self._page_size + rows % self._page_size

    def _count_tokens(self, state: SlotState, chain: SequenceABC[int]) -> None:
        """Let `penalties` know the prompt and the committed output. The chain completes the prompt."""
        if state.num_counted == 0:
            known = [*state.tokens, *chain]
            state.penalties = PenaltyState(known[: state.prompt_length])
            state.num_counted = state.prompt_length
        for token in state.tokens[state.num_counted :]:
            state.penalties.add(token)
        state.num_counted = max(state.num_counted, len(state.tokens))

    def _uncounted(self, state: SlotState, chain: SequenceABC[int]) -> tuple[int, ...]:
        """The part of the chain that is output and not in `penalties` yet."""
        return tuple([*state.tokens, *chain][state.num_counted :])
