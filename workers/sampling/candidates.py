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
from outrider.kernels.sample_shard import ShardLogits
from outrider.workers.communicator import Communicator
from outrider.workers.sampling.law import num_in_top_k, num_kept
from outrider.workers.sampling.params import SamplingParams

_FIRST_COUNT = 128  # tokens a rank sends per row at first: most nuclei of 0.95 are smaller
_GROWTH = 8


@dataclass(frozen=True)
class KeptTokens:
    """All tokens that truncation leaves of one row: largest logit first, ties by id. Never empty."""

    logits: Float32Array  # [num_kept]
    ids: Int64Array  # [num_kept]


def kept_tokens(
    shard: ShardLogits, rows: list[int], params: list[SamplingParams], communicator: Communicator
) -> list[KeptTokens]:
    """Truncate `rows` of the shard. Every rank gets the same result.

    Args:
        shard: this rank's logits, edited and not divided by the temperature.
        rows: the rows to truncate.
        params: of each of `rows`; temperature > 0.
    """
    sums = np.array([_maximum_and_sum(shard, row, p) for row, p in zip(rows, params, strict=True)])
    found: dict[int, KeptTokens] = {}
    pending = list(range(len(rows)))
    count = max(_FIRST_COUNT, 1 + max(p.top_k for p in params))
    while pending:
        message = _pack(shard, [rows[i] for i in pending], sums[pending], count)
        gathered = communicator.all_gather(
            torch.from_numpy(message)
        ).numpy()  # [size, num_pending, 2 + 2 count]
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


def _maximum_and_sum(shard: ShardLogits, row: int, params: SamplingParams) -> tuple[float, float]:
    if params.top_p == 1.0 or params.top_k > 0:
        return 0.0, 0.0  # the mass of the whole vocabulary is not needed
    return shard.maximum(row), shard.exp_sum(row, params.temperature)


def _pack(shard: ShardLogits, rows: list[int], sums: np.ndarray, count: int) -> np.ndarray:
    """float64 [num_rows, 2 + 2 count]: maximum, sum, then logits and ids; -inf where there are no more."""
    message = np.full((len(rows), 2 + 2 * count), -np.inf)
    message[:, :2] = sums
    for j, row in enumerate(rows):
        logits, ids = shard.top(row, count)
        message[j, 2 : 2 + len(logits)] = logits
        message[j, 2 + count : 2 + count + len(ids)] = ids
    return message


def _merge(parts: np.ndarray, params: SamplingParams) -> KeptTokens | None:
    """Kept tokens of one row from what the ranks sent, float64 [size, 2 + 2 count]; None if too little."""
    count = (parts.shape[1] - 2) // 2
    values = parts[:, 2 : 2 + count]
    floor = values[:, -1].max()  # tokens above it are all here; -inf when no rank has more
    logits = values.reshape(-1).astype(np.float32)
    finite = logits > -np.inf
    logits = logits[finite]
    assert logits.size, "every token of a row has logit -inf"
    ids = parts[:, 2 + count :].reshape(-1)[finite].astype(np.int64)
    order = np.lexsort((ids, -logits))
    logits, ids = logits[order], ids[order]
    top_k = num_in_top_k(logits, params.top_k)
    if params.top_k > 0 and logits[top_k - 1] <= floor:
        return None
    with np.errstate(invalid="ignore"):  # a shard of -inf only: its sum is 0
        scaled = np.exp((parts[:, 0] - logits[0]) / np.float32(params.temperature))
    total = float(np.sum(np.where(parts[:, 1] > 0, scaled, 0.0) * parts[:, 1]))
    kept = num_kept(logits, params, total)
    if logits[kept - 1] <= floor:
        return None
    return KeptTokens(logits[:kept], ids[:kept])
