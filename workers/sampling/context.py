"""What the law of a row depends on besides the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

from outrider.kernels.noise import Int64Array, UInt32Array, noise_keys
from outrider.workers.sampling.confinement import NO_WORDS
from outrider.workers.sampling.grammars import Words
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

    def along(self, paths: Sequence[Sequence[int]]) -> tuple[Int64Array, Int64Array, npt.NDArray[np.bool_]]:
        """Prompt, output and path of each of several rows.

        Returns:
            ids int64 [num_ids], distinct: all tokens of prompt, output and any path; counts int64
            [num_rows, num_ids]: how often output and the row's path have each; seen bool [num_rows, num_ids]:
            whether the row has it at all, in the prompt or counted.
        """
        extra: dict[int, int] = {}
        rows, columns = [], []
        for row, path in enumerate(paths):
            for token in path:
                index = self._index.get(token, -1)
                rows.append(row)
                columns.append(index if index >= 0 else extra.setdefault(token, self._num + len(extra)))
        ids = self._ids[: self._num]
        if extra:
            ids = np.concatenate([ids, np.array(list(extra), dtype=np.int64)])
        counts = np.zeros((len(paths), len(ids)), dtype=np.int64)
        counts[:, : self._num] = self._counts[: self._num]
        np.add.at(counts, (rows, columns), 1)
        seen = counts > 0
        seen[:, : self._num] = True
        return ids, counts, seen


@dataclass(slots=True)
class SampledRows:
    """Consecutive rows of logits to sample from that belong to one sequence."""

    params: SamplingParams
    positions: Int64Array
    """[num_rows]: index in the sequence (prompt included) of the token that is sampled from each."""
    penalties: PenaltyState
    """Only looked at when the parameters ask for penalties."""
    paths: Sequence[Sequence[int]] = ()
    """[num_rows] output tokens before the position that `penalties` does not have yet, a tree path; only looked
    at when the parameters ask for penalties."""
    allowed: Words = field(default_factory=lambda: NO_WORDS)
    """[num_rows, num_words]: the tokens that each row may choose from; no rows: any."""


class RowParameters:
    """The parameters of all rows of a batch as arrays [num_rows], each from its own group."""

    def __init__(self, groups: Sequence[SampledRows]) -> None:
        self._groups = groups
        self._lengths = np.array([len(group.positions) for group in groups], dtype=np.int64)
        # float64 holds every one of these numbers as it is, but not seeds.
        numbers = chain.from_iterable([group.params.law for group in groups])
        laws = np.fromiter(numbers, dtype=np.float64, count=6 * len(groups))
        self._laws: npt.NDArray[np.float64] = laws.reshape(-1, 6).repeat(self._lengths, axis=0)
        self.num_rows = len(self._laws)
        self.temperatures = self._laws[:, 0].astype(np.float32)
        self.truncates = self._laws[:, 4] > 0.0

    @cached_property
    def top_k(self) -> Int64Array:
        return self._laws[:, 1].astype(np.int64)

    @property
    def top_p(self) -> npt.NDArray[np.float64]:
        return self._laws[:, 2]

    @property
    def min_p(self) -> npt.NDArray[np.float64]:
        return self._laws[:, 3]

    @property
    def logprobs(self) -> npt.NDArray[np.bool_]:
        """Whether the log-probability of the row's token is reported."""
        return self._laws[:, 5] >= 0.0

    @property
    def max_top_logprobs(self) -> int:
        """The most that any row reports of its likeliest tokens."""
        return max(0, int(self._laws[:, 5].max(initial=0.0)))

    @cached_property
    def keys(self) -> UInt32Array:
        """[num_rows, 2]: of the noise, which greedy rows do without."""
        seeds = np.array([group.params.seed for group in self._groups], dtype=np.uint64)
        positions = [group.positions for group in self._groups]
        return noise_keys(
            seeds.repeat(self._lengths),
            np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64),
        )
