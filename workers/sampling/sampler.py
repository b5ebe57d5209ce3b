"""The one sampler: a token is the argmax over x of log p̃(x) + G(seed, position, x).

p̃ is the law after everything the request asked for (`law.py`), G is counter-based Gumbel noise
(`kernels/noise.py`), absent at temperature 0. Plain decoding and every node of a draft tree use it, and the
drafter proposes with the same noise; so a text is, seed for seed, the same for every way of drafting.

Logits stay on their ranks, and on a GPU whose kernel samples them (else they are copied to its host). A row that
nothing truncates costs one exchange of (score, id) per rank; for the others see `candidates.py`. All ranks
return the same, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from outrider.kernels.noise import Float32Array, Int64Array, Key, noise_key
from outrider.kernels.sample_shard import UInt64Array, first_packed, pack_tokens, perturb, unpack_tokens
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.candidates import KeptTokens, kept_tokens
from outrider.workers.sampling.context import RowContext
from outrider.workers.sampling.law import edit_rows
from outrider.workers.sampling.logprobs import RawLogprobs, raw_logprobs
from outrider.workers.sampling.shards import DeviceShard, HostShard, Shard


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

    def __init__(
        self,
        vocab_size: int,
        vocab_range: range,
        communicator: Communicator,
        kernels: KernelSelection = REFERENCES,
    ) -> None:
        """`kernels`: with `sample_shard` rows are sampled where the logits are, else on the host."""
        assert 0 <= vocab_range.start < vocab_range.stop <= vocab_size
        assert communicator.size > 1 or vocab_range == range(vocab_size)
        self._vocab_size = vocab_size
        self._first, self._end = vocab_range.start, vocab_range.stop
        self._communicator = communicator
        self._kernels = kernels

    def sample(self, logits: torch.Tensor, rows: Sequence[RowContext]) -> Samples:
        """Sample one token per row.

        Args:
            logits: float32 [num_rows, end - first], straight from the model. Edited while this runs, and as
                before when it returns.
            rows: what each row is to be sampled for; the same on every rank.
        """
        assert logits.shape == (len(rows), self._end - self._first)
        logits = self._where_sampled(logits)
        edits = edit_rows(logits, rows, self._first)
        shard = self._shard(logits)
        tokens = np.zeros(len(rows), dtype=np.int64)
        whole = [i for i, row in enumerate(rows) if not row.params.truncates]
        truncated = [i for i, row in enumerate(rows) if row.params.truncates]
        if whole:
            tokens[whole] = self._sample_whole(shard, whole, rows)
        if truncated:
            tokens[truncated] = self._sample_truncated(shard, truncated, rows)
        edits.undo(logits)
        raw = self._raw_logprobs(self._shard(logits) if len(edits.rows) else shard, tokens, rows)
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
        logits = self._where_sampled(logits)
        edits = edit_rows(logits, rows, 0)
        shard = self._shard(logits)
        ids = np.empty((len(rows), num), dtype=np.int64)
        log_probs = np.empty((len(rows), num), dtype=np.float32)
        whole = [i for i, row in enumerate(rows) if not row.params.truncates]
        truncated = [i for i, row in enumerate(rows) if row.params.truncates]
        if whole:
            ids[whole], log_probs[whole] = _propose_whole(shard, whole, rows, num)
        if truncated:
            params = [rows[i].params for i in truncated]
            kept_rows = kept_tokens(shard, truncated, params, self._communicator)
            for i, kept in zip(truncated, kept_rows, strict=True):
                ids[i], log_probs[i] = _propose_kept(shard, i, rows[i], kept, num)
        edits.undo(logits)
        return torch.from_numpy(ids), torch.from_numpy(log_probs)

    def _where_sampled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._kernels.sample_shard else logits.cpu().contiguous()

    def _shard(self, logits: torch.Tensor) -> Shard:
        if self._kernels.sample_shard:
            return DeviceShard(logits, self._first, self._kernels)
        return HostShard(logits, self._first)

    def _sample_whole(self, shard: Shard, indices: list[int], rows: Sequence[RowContext]) -> Int64Array:
        best = np.concatenate(_best(shard, indices, rows, 1))
        message = torch.from_numpy(best.view(np.int64))  # [num_rows]
        gathered = self._communicator.all_gather(message).numpy().view(np.uint64)  # [size, num_rows]
        return unpack_tokens(gathered.min(axis=0))[1]

    def _sample_truncated(self, shard: Shard, indices: list[int], rows: Sequence[RowContext]) -> Int64Array:
        kept_rows = kept_tokens(shard, indices, [rows[i].params for i in indices], self._communicator)
        best = [_scored(kept, rows[i]).min() for i, kept in zip(indices, kept_rows, strict=True)]
        return unpack_tokens(np.array(best))[1]

    def _raw_logprobs(self, shard: Shard, tokens: Int64Array, rows: Sequence[RowContext]) -> RawLogprobs:
        asking = [i for i, row in enumerate(rows) if row.params.logprobs]
        num_top = max((rows[i].params.top_logprobs for i in asking), default=0)
        return raw_logprobs(shard, tokens, asking, num_top, self._communicator)


def _best(shard: Shard, indices: list[int], rows: Sequence[RowContext], num: int) -> list[UInt64Array]:
    keys = [_key(rows[i]) for i in indices]
    return shard.best(indices, [rows[i].params.temperature for i in indices], keys, num)


def _propose_whole(
    shard: Shard, indices: list[int], rows: Sequence[RowContext], num: int
) -> tuple[Int64Array, Float32Array]:
    """Ids and log-probabilities, [num_indices, num] each, of rows that nothing truncates."""
    ids = unpack_tokens(np.stack(_best(shard, indices, rows, num)))[1]
    temperatures = [rows[i].params.temperature or 1.0 for i in indices]
    logits = shard.logits(np.repeat(indices, num).tolist(), ids.ravel()).reshape(ids.shape)
    divisors = np.array(temperatures, dtype=np.float32)[:, None]
    scaled = (logits - shard.maxima(indices)[:, None]) / divisors
    return ids, scaled - np.log(shard.exp_sums(indices, temperatures)).astype(np.float32)[:, None]


def _propose_kept(
    shard: Shard, index: int, row: RowContext, kept: KeptTokens, num: int
) -> tuple[Int64Array, Float32Array]:
    """Ids and log-probabilities, [num] each, of a row with these tokens left."""
    ids = unpack_tokens(first_packed(_scored(kept, row), num))[1]
    temperature = np.float32(row.params.temperature)
    log_total = np.log(np.exp((kept.logits - kept.logits[0]) / temperature).sum())
    log_probs = np.full(num, -np.inf, dtype=np.float32)
    logits = kept.logits_of(ids)
    log_probs[: len(ids)] = (logits - kept.logits[0]) / temperature - log_total
    # The kept tokens are the first of the likeliest: where they are too few, go on with the next ones.
    more = unpack_tokens(shard.top([index], num)[0])[1][len(ids) :] if len(ids) < num else ids[:0]
    return np.concatenate([ids, more]), log_probs


def _scored(kept: KeptTokens, row: RowContext) -> UInt64Array:
    """Kept tokens packed with their scores."""
    return pack_tokens(perturb(kept.logits, kept.ids, row.params.temperature, _key(row)), kept.ids)


def _key(row: RowContext) -> Key:
    return noise_key(row.params.seed, row.position)
