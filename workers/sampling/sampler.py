"""The one sampler: a token is the argmax over x of log p̃(x) + G(seed, position, x).

p̃ is the law after everything the request asked for (`law.py`), G is counter-based Gumbel noise
(`kernels/noise.py`), absent at temperature 0. Plain decoding and every node of a draft tree use it, and the
drafter proposes with the same noise; so a text is, seed for seed, the same for every way of drafting.

Logits stay on their ranks. A row that nothing truncates costs one exchange of (score, id) per rank; for the
others see `candidates.py`. All ranks return the same, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from outrider.kernels.noise import Int64Array, noise_key
from outrider.kernels.sample_shard import (
    ShardLogits,
    UInt64Array,
    first_packed,
    pack_tokens,
    perturb,
    unpack_tokens,
)
from outrider.workers.communicator import Communicator
from outrider.workers.sampling.candidates import KeptTokens, kept_tokens
from outrider.workers.sampling.context import RowContext
from outrider.workers.sampling.law import Edit, edit_row
from outrider.workers.sampling.logprobs import RawLogprobs, raw_logprobs


@dataclass(frozen=True)
class Samples:
    """Sampled tokens, and log-probabilities (nats) under the model's own law for rows that asked."""

    tokens: torch.Tensor  # int64 [num_rows]
    logprobs: torch.Tensor  # float32 [num_rows]; 0 where a row did not ask
    top_ids: torch.Tensor  # int64 [num_rows, k], likeliest first; k is the most that any row asks for
    top_logprobs: torch.Tensor  # float32 [num_rows, k]


class Sampler:
    """Samples from logits of which this rank has the token ids `vocab_range`.

    The ranges of the ranks ascend with the rank and cover the vocabulary.
    """

    def __init__(self, vocab_size: int, vocab_range: range, communicator: Communicator) -> None:
        assert 0 <= vocab_range.start < vocab_range.stop <= vocab_size
        assert communicator.size > 1 or vocab_range == range(vocab_size)
        self._vocab_size = vocab_size
        self._first, self._end = vocab_range.start, vocab_range.stop
        self._communicator = communicator

    def sample(self, logits: torch.Tensor, rows: Sequence[RowContext]) -> Samples:
        """Sample one token per row.

        Args:
            logits: float32 [num_rows, end - first], straight from the model. Edited while this runs, and as
                before when it returns.
            rows: what each row is to be sampled for; the same on every rank.
        """
        assert logits.shape == (len(rows), self._end - self._first)
        logits = logits.contiguous()
        edits = self._edit(logits, rows)
        shard = ShardLogits(logits, self._first)
        tokens = np.zeros(len(rows), dtype=np.int64)
        whole = [i for i, row in enumerate(rows) if not row.params.truncates]
        truncated = [i for i, row in enumerate(rows) if row.params.truncates]
        if whole:
            tokens[whole] = self._sample_whole(shard, whole, rows)
        if truncated:
            tokens[truncated] = self._sample_truncated(shard, truncated, rows)
        for i, edit in edits:
            edit.undo(logits[i])
        raw = self._raw_logprobs(ShardLogits(logits, self._first) if edits else shard, tokens, rows)
        return Samples(torch.from_numpy(tokens), raw.logprobs, raw.top_ids, raw.top_logprobs)

    def propose(
        self, logits: torch.Tensor, rows: Sequence[RowContext], num: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `num` best tokens of each row by log p̃ + G, for drafting: the first is what `sample` returns.

        Needs the whole vocabulary on this rank.

        Args:
            logits: float32 [num_rows, vocab_size]; edited while this runs, and as before when it returns.
            rows: what each row is to be sampled for.
            num: at most vocab_size.

        Returns:
            ids int64 [num_rows, num], distinct within a row, best first, and log p̃ of each, float32
            [num_rows, num]: -inf for tokens that p̃ removes, which stand last and only where p̃ leaves fewer
            than `num`. A greedy row is ranked by logits, its log-probabilities are those of temperature 1.
        """
        assert self._communicator.size == 1
        assert logits.shape == (len(rows), self._vocab_size)
        assert num <= self._vocab_size
        logits = logits.contiguous()
        edits = self._edit(logits, rows)
        shard = ShardLogits(logits, 0)
        ids = np.zeros((len(rows), num), dtype=np.int64)
        log_probs = np.full((len(rows), num), -np.inf, dtype=np.float32)
        truncated = [i for i, row in enumerate(rows) if row.params.truncates]
        for i, row in enumerate(rows):
            if not row.params.truncates:
                temperature = row.params.temperature
                key = noise_key(row.params.seed, row.position)
                _, ids[i] = unpack_tokens(shard.best(i, temperature, key, num))
                divisor = temperature or 1.0
                x = (logits[i].numpy()[ids[i]] - np.float32(shard.maximum(i))) / np.float32(divisor)
                log_probs[i] = x - np.log(shard.exp_sum(i, divisor))
        params = [rows[i].params for i in truncated]
        kept_rows = kept_tokens(shard, truncated, params, self._communicator) if truncated else []
        for i, kept in zip(truncated, kept_rows, strict=True):
            packed = first_packed(_scored(kept, rows[i]), num)
            count = len(packed)
            ids[i, :count] = unpack_tokens(packed)[1]
            divisor = np.float32(rows[i].params.temperature)
            log_total = np.log(np.exp((kept.logits - kept.logits[0]) / divisor).sum())
            log_probs[i, :count] = (logits[i].numpy()[ids[i, :count]] - kept.logits[0]) / divisor - log_total
            if count < num:  # kept tokens are the first of the likeliest: go on with the next ones
                ids[i, count:] = unpack_tokens(shard.top(i, num))[1][count:]
        for i, edit in edits:
            edit.undo(logits[i])
        return torch.from_numpy(ids), torch.from_numpy(log_probs)

    def _edit(self, logits: torch.Tensor, rows: Sequence[RowContext]) -> list[tuple[int, Edit]]:
        return [
            (i, edit_row(logits[i], row, self._first))
            for i, row in enumerate(rows)
            if row.params.edits_logits
        ]

    def _sample_whole(self, shard: ShardLogits, indices: list[int], rows: Sequence[RowContext]) -> Int64Array:
        best = [
            shard.best(i, rows[i].params.temperature, noise_key(rows[i].params.seed, rows[i].position), 1)
            for i in indices
        ]
        message = torch.from_numpy(np.concatenate(best).view(np.int64))  # [num_rows]
        gathered = self._communicator.all_gather(message).numpy().view(np.uint64)  # [size, num_rows]
        return unpack_tokens(gathered.min(axis=0))[1]

    def _sample_truncated(
        self, shard: ShardLogits, indices: list[int], rows: Sequence[RowContext]
    ) -> Int64Array:
        kept_rows = kept_tokens(shard, indices, [rows[i].params for i in indices], self._communicator)
        best = [_scored(kept, rows[i]).min() for i, kept in zip(indices, kept_rows, strict=True)]
        return unpack_tokens(np.array(best))[1]

    def _raw_logprobs(
        self, shard: ShardLogits, tokens: Int64Array, rows: Sequence[RowContext]
    ) -> RawLogprobs:
        asking = [i for i, row in enumerate(rows) if row.params.logprobs]
        num_top = max((rows[i].params.top_logprobs for i in asking), default=0)
        return raw_logprobs(shard, tokens, asking, num_top, self._communicator)


def _scored(kept: KeptTokens, row: RowContext) -> UInt64Array:
    """Kept tokens packed with their scores."""
    key = noise_key(row.params.seed, row.position)
    return pack_tokens(perturb(kept.logits, kept.ids, row.params.temperature, key), kept.ids)
