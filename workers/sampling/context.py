"""What the law of a row depends on besides the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.workers.sequences.params import SamplingParams


class PenaltyState:
    """The distinct tokens of one sequence and how often its output has each; grows token by token."""

    def __init__(self, prompt_tokens: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_tokens, dtype=np.int64))
        self._index = {token: i for i, token in enumerate(distinct.tolist())}
        self._num = len(distinct)
        self._ids = np.zeros(max(64, 2 * self._num), dtype=np.int64)
        self._ids[: self._num] = distinct
        self._counts = np.zeros(len(self._ids), dtype=np.int64)

    def add(self, token: int) -> None:
        """`token` joins the output."""
        index = self._index.get(token, -1)
        if index < 0:
            index = self._num
            if index == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._index[token] = index
            self._ids[index] = token
            self._num += 1
        self._counts[index] += 1

    def with_path(self, path: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Distinct token ids of prompt, output and `path`, and how often output and path have each."""
        counts = self._counts[: self._num].copy()
        extra: dict[int, int] = {}
        for token in path:
            index = self._index.get(token, -1)
            if index >= 0:
                counts[index] += 1
            else:
                extra[token] = extra.get(token, 0) + 1
        ids = self._ids[: self._num]
        if extra:
            ids = np.concatenate([ids, np.array(list(extra), dtype=np.int64)])
            counts = np.concatenate([counts, np.array(list(extra.values()), dtype=np.int64)])
        return ids, counts


@dataclass(frozen=True)
class RowContext:
    """One row of logits to sample from: whose it is and where in the sequence it stands."""

    params: SamplingParams
    position: int
    """Index in the sequence (prompt included) of the token that is sampled."""
    penalties: PenaltyState
    """Shared by all rows of a sequence; only looked at when the parameters ask for penalties."""
    path_tokens: tuple[int, ...] = ()
    """Output tokens before `position` that `penalties` does not have yet: a tree path."""
