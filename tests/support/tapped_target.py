"""A draft method alone, played by hand, whose features are of a target that is not there: rows made of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceABC
from functools import cache

import numpy as np
import torch

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod, Verified, VerifiedStep
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.hidden import HiddenRows
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.weights.random_source import RandomSource
from support.drafted import GREEDY, answer, cut_of, sequence_of

VOCAB, HIDDEN, TAPS = 96, 32, (1, 2, 4)
TARGET = RandomSource(
    f"random:llama?hidden_size={HIDDEN}&num_layers=4&num_heads=4&num_kv_heads=2&vocab_size={VOCAB}"
)
PROMPT = [5, 6, 7, 8, 9, 10]


def tap_rows(tokens: SequenceABC[int]) -> torch.Tensor:
    """[len(tokens), 3, HIDDEN]: what this target has for each token, which depends on all up to it."""
    return torch.stack([_tap_row(bytes(tokens[:end])) for end in range(1, len(tokens) + 1)])


@cache
def _tap_row(tokens: bytes) -> torch.Tensor:
    seed = int.from_bytes(hashlib.blake2b(tokens, digest_size=6).digest(), "big")
    return torch.randn(len(TAPS), HIDDEN, generator=torch.Generator().manual_seed(seed))


class TappedDrafting:
    """An engine with one method; rows of the target are given when it would have them."""

    method: DraftMethod

    def __init__(self, max_nodes: int) -> None:
        """Who derives from this adds the method, to the engine, too."""
        self.engine = DraftEngine(DraftedSlots(4, max_nodes, 16))
        self.trees = self.engine.trees

    def start(
        self,
        prompt: SequenceABC[int] = PROMPT,
        slot: int = 0,
        num_shared: int = 0,
        sampling: SamplingParams = GREEDY,
        max_depth: int = 4,
    ) -> Sequence:
        sequence = sequence_of(prompt, slot, (self.method.name,), 8, max_depth, sampling)
        sequence.num_committed = num_shared
        self.engine.start(sequence)
        return sequence

    def target_reads(self, sequence: Sequence, count: int) -> None:
        """The target computes so many known tokens; a prompt's, or those that a verdict brought."""
        known = sequence.num_committed
        rows = tap_rows(sequence.tokens)[known : known + count]
        hidden = HiddenRows(
            {layer: rows[:, i] for i, layer in enumerate(TAPS)}, np.zeros(1, np.int64), np.zeros(1, np.int64)
        )
        step = VerifiedStep(sequence, 0, known, np.arange(count), count, np.zeros(0, dtype=np.int64))
        self.engine.observe(Verified((step,), hidden))
        sequence.num_committed += count

    def verdict(self, sequence: Sequence, chosen: list[int], said: dict[int, int]) -> None:
        """As the engine's own order: tokens are known, their rows are observed, the tree is re-rooted."""
        slot, trees = sequence.slot, self.trees
        reroot = trees.reroot

        def observed_first(*of):  # type: ignore[no-untyped-def]
            self.target_reads(sequence, len(sequence.tokens) - 1 - sequence.num_committed)
            return reroot(*of)

        trees.reroot = observed_first  # type: ignore[method-assign]
        answer(self.engine, [slot], cut_of(trees, {slot: chosen}), [said])
        trees.reroot = reroot  # type: ignore[method-assign]

    def expand(self, *slots: int) -> bool:
        return self.engine.expand(self.method, np.array(slots or (0,)))

    def forecast(self, slot: int = 0) -> tuple[int, float]:
        found = self.method.forecast(np.array([slot]))
        return found.num_rows, float(found.gains.sum())
