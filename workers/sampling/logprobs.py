"""Log-probabilities under the model's own law, over vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from outrider.kernels.noise import Int64Array
from outrider.kernels.token_rows import unpack_tokens
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.shards import Shard

_LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True)
class RawLogprobs:
    """Nats; zeros in rows that did not ask."""

    logprobs: torch.Tensor  # float32 [num_rows], of the sampled tokens
    top_ids: torch.Tensor  # int64 [num_rows, num_top], likeliest first, ties by id
    top_logprobs: torch.Tensor  # float32 [num_rows, num_top]


def raw_logprobs(
    shard: Shard,
    vocab_range: range,
    tokens: Int64Array,
    asking: Int64Array,
    num_top: int,
    communicator: Communicator,
) -> RawLogprobs:
    """Log-probabilities of `tokens` and of the `num_top` likeliest in the rows `asking`; one exchange if any.

    Args:
        shard: this rank's logits as the model gave them, of the token ids `vocab_range`.
        tokens: int64 [num_rows], sampled from each row.
        asking: int64, rows to report on; the same on every rank.
        num_top: at most the vocabulary.
    """
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    top_ids = np.zeros((len(tokens), num_top), dtype=np.int64)
    top_logprobs = np.zeros((len(tokens), num_top), dtype=np.float32)
    if len(asking):
        message = np.full((len(asking), 3 + 2 * num_top), -np.inf)
        message[:, 3 + num_top :] = np.inf  # ids after all others, where a shard has fewer tokens
        maxima = np.maximum(shard.maxima(asking), _LOWEST)  # a shard of removed tokens has no mass
        message[:, 1] = maxima
        message[:, 2] = shard.exp_sums(asking, maxima, np.ones(len(asking), dtype=np.float32))
        chosen = tokens[asking]
        own = np.flatnonzero((chosen >= vocab_range.start) & (chosen < vocab_range.stop))
        message[own, 0] = shard.logits(asking[own], chosen[own])
        if num_top > 0:
            values, ids = unpack_tokens(shard.top(asking, num_top))
            message[:, 3 : 3 + values.shape[1]] = values
            message[:, 3 + num_top : 3 + num_top + ids.shape[1]] = ids
        # [size, num_asking, 3 + 2 num_top]
        gathered = communicator.all_gather(torch.from_numpy(message)).numpy()
        largest = gathered[:, :, 1].max(axis=0)
        total = np.sum(np.exp(gathered[:, :, 1] - largest) * gathered[:, :, 2], axis=0)
        log_total = np.log(total)
        logprobs[asking] = gathered[:, :, 0].max(axis=0) - largest - log_total
        if num_top > 0:
            values = np.concatenate(list(gathered[:, :, 3 : 3 + num_top]), axis=1)
            ids = np.concatenate(list(gathered[:, :, 3 + num_top :]), axis=1)
            order = np.lexsort((ids, -values))[:, :num_top]
            top_ids[asking] = np.take_along_axis(ids, order, axis=1)
            top_logprobs[asking] = (
                np.take_along_axis(values, order, axis=1) - largest[:, None] - log_total[:, None]
            )
    return RawLogprobs(torch.from_numpy(logprobs), torch.from_numpy(top_ids), torch.from_numpy(top_logprobs))
