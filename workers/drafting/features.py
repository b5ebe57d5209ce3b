"""What the target said of known tokens, for who draws on it later: kept by slot until it is read, within bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from outrider.workers.drafting.method import Verified
from outrider.workers.sequences.tree import Bools, Ints


class FeatureStore:
    """A feature for each position of a slot's text, from the first that nobody has read on.

    Attributes:
        ends: int64 [S], positions of which features have come.
        is_lost: bool [S]: some never came, or there was no room: of this text none are kept.
    """

    def __init__(self, num_slots: int, max_features: int) -> None:
        """`max_features`: of all slots together; more are not kept."""
        self.ends = np.zeros(num_slots, dtype=np.int64)
        self.is_lost = np.zeros(num_slots, dtype=np.bool_)
        self._firsts = np.zeros(num_slots, dtype=np.int64)  # position of the first that is kept
        self._features = [torch.empty(0)] * num_slots  # [n, hidden] each
        self._max_features = max_features
        self._num_features = 0

    def start(self, slot: int, first: int, end: int) -> None:
        """A text of which features come from position `end` on, and are wanted from `first` on."""
        self._drop(slot, 0)
        self._firsts[slot], self.ends[slot] = first, end
        self.is_lost[slot] = end > first

    def num_unwanted(self, slot: int, count: int) -> int:
        """How many of the next `count` features nobody wants: the first ones."""
        if self.is_lost[slot]:
            return count
        return int(np.clip(self._firsts[slot] - self.ends[slot], 0, count))

    def append(self, slot: int, num_skipped: int, features: Tensor) -> None:
        """The next features of a text [n, hidden], behind those that nobody wants."""
        self.ends[slot] += num_skipped + len(features)
        if self.is_lost[slot] or not len(features):
            return
        if self._num_features + len(features) > self._max_features:
            self._drop(slot, 0)
            self.is_lost[slot] = True
            return
        kept = self._features[slot]
        self._features[slot] = torch.cat([kept, features]) if len(kept) else features
        self._num_features += len(features)

    def keep(
        self, verified: Verified, layers: tuple[int, ...], make: Callable[[Tensor], Tensor], width: int
    ) -> None:
        """Keep the features of the tokens that the target has rows of now, as far as they are wanted.

        Args:
            layers: whose rows `make` reads side by side, [N, layers * hidden] -> [N, width].
        """
        hidden = verified.hidden
        if hidden is None:
            return
        skipped = [self.num_unwanted(step.sequence.slot, len(step.committed)) for step in verified.steps]
        wanted = [
            hidden.rows_of(step.index, step.committed[count:])
            for step, count in zip(verified.steps, skipped, strict=True)
        ]
        index, features = np.concatenate(wanted), torch.empty(0, width)
        if len(index):
            rows = [hidden.layers[layer] for layer in layers]
            at = torch.from_numpy(index).to(rows[0].device)
            features = make(torch.cat([of_layer[at] for of_layer in rows], dim=1))
        parts = features.split([len(rows) for rows in wanted])
        for step, count, new in zip(verified.steps, skipped, parts, strict=True):
            assert step.num_known == self.ends[step.sequence.slot]
            self.append(step.sequence.slot, count, new)

    def next(self, slot: int, count: int) -> Tensor:
        """[count, hidden]: the first features that are kept."""
        assert count <= len(self._features[slot])
        return self._features[slot][:count]

    def drop_read(self, slots: Ints, firsts: Ints) -> None:
        """Of these slots nobody wants what lies before positions `firsts`."""
        for slot, first in zip(slots.tolist(), firsts.tolist(), strict=True):
            count = min(first - int(self._firsts[slot]), len(self._features[slot]))
            if count > 0:
                self._drop(slot, len(self._features[slot]) - count)
            self._firsts[slot] = max(first, int(self._firsts[slot]))

    def finish(self, slot: int) -> None:
        """The text has left its slot."""
        self._drop(slot, 0)

    def have_all(self, slots: Ints, num_tokens: Ints) -> Bools:
        """[B]: whether the features of all tokens but the last are or were here."""
        return ~self.is_lost[slots] & (self.ends[slots] == num_tokens - 1)

    def _drop(self, slot: int, num_left: int) -> None:
        kept = self._features[slot]
        self._num_features -= len(kept) - num_left
        # A copy, so that the rest does not hold on to all of what a round brought.
        self._features[slot] = kept[len(kept) - num_left :].clone()
