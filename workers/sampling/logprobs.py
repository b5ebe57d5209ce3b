"""Log-probabilities under the model's own law, over vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from outrider.kernels.noise import Int64Array
from outrider.kernels.sample_shard import unpack_tokens
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.shards import Shard


@dataclass(frozen=True)
class RawLogprobs:
    """Nats; zeros in rows that did not ask."""

    logprobs: torch.Tensor  # float32 [num_rows], of the sampled tokens
    top_ids: torch.Tensor  # int64 [num_rows, num_top], likeliest first, ties by id
    top_logprobs: torch.Tensor  # float32 [num_rows, num_top]


def raw_logprobs(
    shard: Shard, tokens: Int64Array, asking: list[int], num_top: int, communicator: Communicator
) -> RawLogprobs:
    """Log-probabilities of `tokens` and of the `num_top` likeliest in the rows `asking`; one exchange if any.

    Args:
        shard: this rank's logits as the model gave them.
        tokens: int64 [num_rows], sampled from each row.
        asking: rows to report on; the same on every rank.
        num_top: at most the vocabulary.
    """
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    top_ids = np.zeros((len(tokens), num_top), dtype=np.int64)
    top_logprobs = np.zeros((len(tokens), num_top), dtype=np.float32)
    if asking:
        message = np.full((len(asking), 3 + 2 * num_top), -np.inf)
        message[:, 1] = shard.maxima(asking)
        message[:, 2] = shard.exp_sums(asking, [1.0] * len(asking))
        own = [j for j, row in enumerate(asking) if shard.has(int(tokens[row]))]
        if own:
            chosen_rows = [asking[j] for j in own]
            message[own, 0] = shard.logits(chosen_rows, tokens[chosen_rows])
        for j, packed in enumerate(shard.top(asking, num_top) if num_top > 0 else []):
            values, ids = unpack_tokens(packed)
            message[j, 3 : 3 + len(values)] = values
            message[j, 3 + num_top : 3 + num_top + len(ids)] = ids
        gathered = communicator.all_gather(
            torch.from_numpy(message)
        ).numpy()  # [size, num_asking, 3 + 2 num_top]
        for j, row in enumerate(asking):
            chosen, maxima, sums = gathered[:, j, :3].T
            log_total = maxima.max() + np.log(np.sum(np.exp(maxima - maxima.max()) * sums))
            logprobs[row] = chosen.max() - log_total
            values = gathered[:, j, 3 : 3 + num_top].reshape(-1)
            ids = gathered[:, j, 3 + num_top :].reshape(-1)
            order = np.lexsort((ids, -values))[:num_top]
            top_ids[row] = ids[order]
            top_logprobs[row] = values[order] - log_total
    return RawLogprobs(torch.from_numpy(logprobs), torch.from_numpy(top_ids), torch.from_numpy(top_logprobs))
