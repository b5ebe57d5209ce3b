"""The likeliest tokens of truncated rows, found over vocabulary shards without gathering logits.

Every rank sends its likeliest tokens of each row. What top-k, top-p and min-p keep is a prefix of the merged
list, and it is final once it ends above the last token that any rank sent; rows where it does not go round
again with more tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from outrider.kernels.noise import Float32Array, Int64Array
from outrider.kernels.sample_shard import UInt64Array, unpack_tokens
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.law import num_in_top_k, num_kept
from outrider.workers.sampling.shards import REMOVED, Shard
from outrider.workers.sequences.params import SamplingParams

_FIRST_COUNT = 128  # tokens a rank sends per row at first: most nuclei of 0.95 are smaller
_GROWTH = 8
_PADDING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class KeptTokens:
    """All tokens that truncation leaves of one row: largest logit first, ties by id. Never empty."""

    logits: Float32Array  # [num_kept]
    ids: Int64Array  # [num_kept]

    def logits_of(self, ids: Int64Array) -> Float32Array:
        """[n]: the logits of some of them."""
        order = np.argsort(self.ids)
        return self.logits[order[np.searchsorted(self.ids, ids, sorter=order)]]


def kept_tokens(
    shard: Shard, rows: list[int], params: list[SamplingParams], communicator: Communicator
) -> list[KeptTokens]:
    """Truncate `rows` of the shard. Every rank gets the same result.

    Args:
        shard: this rank's logits, edited and not divided by the temperature.
        rows: the rows to truncate.
        params: of each of `rows`; temperature > 0.
    """
    sums = _maxima_and_sums(shard, rows, params)
    found: dict[int, KeptTokens] = {}
    pending = list(range(len(rows)))
    count = max(_FIRST_COUNT, 1 + max(p.top_k for p in params))
    while pending:
        message = _pack(shard, [rows[i] for i in pending], sums[pending], count)
        # [size, num_pending, 2 + count]
        gathered = communicator.all_gather(message).numpy().view(np.uint64)
        unfinished = []
        for j, i in enumerate(pending):
            kept = _merge(gathered[:, j], params[i])
            if kept is None:
                unfinished.append(i)
            else:
                found[i] = kept
        pending = unfinished
        count *= _GROWTH
    return [found[i] for i in range(len(rows))]


def _maxima_and_sums(shard: Shard, rows: list[int], params: list[SamplingParams]) -> np.ndarray:
    """float64 [num_rows, 2] of the shard; -inf and 0 where the mass of the whole vocabulary is not needed."""
    result = np.tile([-np.inf, 0.0], (len(rows), 1))
    needed = [i for i, p in enumerate(params) if p.top_p < 1.0 and p.top_k == 0]
    if needed:
        chosen = [rows[i] for i in needed]
        result[needed, 0] = shard.maxima(chosen)
        result[needed, 1] = shard.exp_sums(chosen, [params[i].temperature for i in needed])
    return result


def _pack(shard: Shard, rows: list[int], sums: np.ndarray, count: int) -> torch.Tensor:
    """int64 [num_rows, 2 + count]: bits of maximum and sum (float64), then packed tokens and padding."""
    message = np.full((len(rows), 2 + count), _PADDING)
    message[:, :2] = sums.view(np.uint64)
    for j, tokens in enumerate(shard.top(rows, count)):
        message[j, 2 : 2 + len(tokens)] = tokens
    return torch.from_numpy(message.view(np.int64))


def _merge(parts: UInt64Array, params: SamplingParams) -> KeptTokens | None:
    """Kept tokens of one row from the ranks' messages, [size, 2 + count]; None if they are too few."""
    maxima, sums = parts[:, 0].view(np.float64), parts[:, 1].view(np.float64)
    last_sent, _ = unpack_tokens(parts[parts[:, -1] != _PADDING, -1])  # of ranks that may have more
    floor = last_sent.max(initial=-np.inf)  # tokens above it are all here
    packed = parts[:, 2:].reshape(-1)
    packed = packed[packed < REMOVED] if len(parts) == 1 else np.sort(packed[packed < REMOVED])
    assert packed.size, "every token of a row has logit -inf"
    logits, ids = unpack_tokens(packed)
    in_top_k = num_in_top_k(logits, params.top_k)
    if params.top_k > 0 and logits[in_top_k - 1] <= floor:
        return None
    total = float(np.sum(sums * np.exp((maxima - logits[0]) / np.float32(params.temperature))))
    kept = num_kept(logits, params, total)
    if logits[kept - 1] <= floor:
        return None
    return KeptTokens(logits[:kept], ids[:kept])
