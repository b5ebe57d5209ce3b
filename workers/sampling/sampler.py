"""The one sampler: a token is the argmax over x of log p̃(x) + G(seed, position, x).

p̃ is the law after everything the request asked for (`law.py`), G is counter-based Gumbel noise
(`kernels/noise.py`), absent at temperature 0. Plain decoding and every node of a draft tree use it, and the
drafter proposes with the same noise; so a text is, seed for seed, the same for every way of drafting.

Logits stay on their ranks (those of a GPU are copied to its host, unless its kernel samples them). A row that
nothing truncates costs one exchange of (score, id) per rank; for the others see `candidates.py`. All ranks
return the same, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from outrider.kernels.noise import Float32Array, Int64Array, Key, noise_key
from outrider.kernels.sample_shard import (
    ShardLogits,
    UInt64Array,
    first_packed,
    pack_tokens,
    perturb,
    sample_shard,
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

    def __init__(
        self, vocab_size: int, vocab_range: range, communicator: Communicator, use_kernel: bool = False
    ) -> None:
        """`use_kernel`: rows of a batch that only need their token are sampled where the logits are."""
        assert 0 <= vocab_range.start < vocab_range.stop <= vocab_size
        assert communicator.size > 1 or vocab_range == range(vocab_size)
        self._vocab_size = vocab_size
        self._first, self._end = vocab_range.start, vocab_range.stop
        self._communicator = communicator
        self._use_kernel = use_kernel

    def sample(self, logits: torch.Tensor, rows: Sequence[RowContext]) -> Samples:
        """Sample one token per row.

        Args:
            logits: float32 [num_rows, end - first], straight from the model. Edited while this runs, and as
                before when it returns.
            rows: what each row is to be sampled for; the same on every rank.
        """
        assert logits.shape == (len(rows), self._end - self._first)
        only_tokens = not any(
            row.params.truncates or row.params.edits_logits or row.params.logprobs for row in rows
        )
        if self._use_kernel and only_tokens:
            return self._sample_by_kernel(logits, rows)
        logits = logits.cpu().contiguous()
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
        logits = logits.cpu().contiguous()
        edits = self._edit(logits, rows)
        shard = ShardLogits(logits, 0)
        truncated = [i for i, row in enumerate(rows) if row.params.truncates]
        params = [rows[i].params for i in truncated]
        kept_rows = kept_tokens(shard, truncated, params, self._communicator) if truncated else []
        kept = dict(zip(truncated, kept_rows, strict=True))
        proposals = [
            _propose_kept(shard, i, row, kept[i], num) if i in kept else _propose_whole(shard, i, row, num)
            for i, row in enumerate(rows)
        ]
        for i, edit in edits:
            edit.undo(logits[i])
        ids = np.stack([row_ids for row_ids, _ in proposals])
        return torch.from_numpy(ids), torch.from_numpy(np.stack([log_probs for _, log_probs in proposals]))

    def _edit(self, logits: torch.Tensor, rows: Sequence[RowContext]) -> list[tuple[int, Edit]]:
        return [
            (i, edit_row(logits[i], row, self._first))
            for i, row in enumerate(rows)
            if row.params.edits_logits
        ]

    def _sample_whole(self, shard: ShardLogits, indices: list[int], rows: Sequence[RowContext]) -> Int64Array:
        best = [shard.best(i, rows[i].params.temperature, _key(rows[i]), 1) for i in indices]
        message = torch.from_numpy(np.concatenate(best).view(np.int64))  # [num_rows]
        gathered = self._communicator.all_gather(message).numpy().view(np.uint64)  # [size, num_rows]
        return unpack_tokens(gathered.min(axis=0))[1]

    def _sample_by_kernel(self, logits: torch.Tensor, rows: Sequence[RowContext]) -> Samples:
        temperatures = [row.params.temperature for row in rows]
        keys = [_key(row) for row in rows]
        best = sample_shard(logits, temperatures, keys, self._first, use_kernel=True)
        packed = pack_tokens(best.values.cpu().numpy(), best.ids.cpu().numpy())
        gathered = self._communicator.all_gather(torch.from_numpy(packed.view(np.int64)))
        tokens = unpack_tokens(gathered.numpy().view(np.uint64).min(axis=0))[1]
        none = torch.zeros(len(rows), 0)
        return Samples(torch.from_numpy(tokens), torch.zeros(len(rows)), none.long(), none)

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


def _propose_whole(
    shard: ShardLogits, index: int, row: RowContext, num: int
) -> tuple[Int64Array, Float32Array]:
    """Ids and log-probabilities, [num] each, of a row that nothing truncates."""
    _, ids = unpack_tokens(shard.best(index, row.params.temperature, _key(row), num))
    temperature = row.params.temperature or 1.0
    scaled = (shard.logits(index, ids) - np.float32(shard.maximum(index))) / np.float32(temperature)
    return ids, scaled - np.float32(np.log(shard.exp_sum(index, temperature)))


def _propose_kept(
    shard: ShardLogits, index: int, row: RowContext, kept: KeptTokens, num: int
) -> tuple[Int64Array, Float32Array]:
    """Ids and log-probabilities, [num] each, of a row with these tokens left."""
    ids = unpack_tokens(first_packed(_scored(kept, row), num))[1]
    temperature = np.float32(row.params.temperature)
    log_total = np.log(np.exp((kept.logits - kept.logits[0]) / temperature).sum())
    log_probs = np.full(num, -np.inf, dtype=np.float32)
    log_probs[: len(ids)] = (shard.logits(index, ids) - kept.logits[0]) / temperature - log_total
    # The kept tokens are the first of the likeliest: where they are too few, go on with the next ones.
    more = unpack_tokens(shard.top(index, num))[1][len(ids) :] if len(ids) < num else ids[:0]
    return np.concatenate([ids, more]), log_probs


def _scored(kept: KeptTokens, row: RowContext) -> UInt64Array:
    """Kept tokens packed with their scores."""
    return pack_tokens(perturb(kept.logits, kept.ids, row.params.temperature, _key(row)), kept.ids)


def _key(row: RowContext) -> Key:
    return noise_key(row.params.seed, row.position)
