"""The best token of each row over one rank's shard of the vocabulary, and what log-probabilities need.

The token of a row is the argmax of logit / temperature + Gumbel(key, id), ties to the smaller id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from outrider.kernels.noise import (
    Float32Array,
    Key,
    UInt32Array,
)
from outrider.kernels.operators import sample_shard_op
from outrider.kernels.shapes import check_kernel_arguments, check_shapes
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.shard_logits import ShardLogits
from outrider.kernels.token_rows import (
    unpack_tokens,
)


class ShardSample(NamedTuple):
    """The best token of each row within a shard."""

    values: torch.Tensor  # float32 [num_rows]: logit / temperature + noise; the logit at temperature 0
    ids: torch.Tensor  # int64 [num_rows]: ids of the whole vocabulary
    maxima: torch.Tensor  # float32 [num_rows]: the largest logit / temperature; temperature 0 counts as 1
    exp_sums: torch.Tensor  # float64 [num_rows]: sum over the shard of exp(logit / temperature - maximum)


def sample_shard(
    logits: torch.Tensor,
    temperatures: Sequence[float] | Float32Array,
    keys: Sequence[Key] | UInt32Array,
    shard_ids: ShardIds,
    use_kernel: bool = False,
) -> ShardSample:
    """Sample each row of a shard; see the module's docstring.

    Args:
        logits: float32 [num_rows, shard_size], processed; -inf removes a token.
        temperatures: one per row; 0 takes the largest logit without noise.
        keys: `noise_key` of each row's seed and position.
        shard_ids: the token id of each column.
        use_kernel: run `sample_shard.cu` (logits on a GPU); the result is on that GPU.

    Raises:
        ValueError: there are not as many temperatures and keys as rows, or ids as columns.
    """
    for name, values in (("temperatures", temperatures), ("keys", keys)):
        if len(values) != logits.shape[0]:
            raise ValueError(f"{name} has {len(values)} entries, logits has {logits.shape[0]} rows")
    if len(shard_ids) != logits.shape[1]:
        raise ValueError(f"shard_ids has {len(shard_ids)} entries, logits has {logits.shape[1]} columns")
    if not use_kernel:
        return sample_shard_by_reference(logits, temperatures, keys, shard_ids)
    check_shapes((("logits", logits, ("num_rows", "shard_size")),))
    check_kernel_arguments((("logits", logits, torch.float32),))
    scores, tokens, largest, sums = sample_shard_op(
        logits,
        torch.as_tensor(np.asarray(temperatures, dtype=np.float32), device=logits.device),
        torch.as_tensor(np.asarray(keys, dtype=np.int64).reshape(-1, 2), device=logits.device),
        shard_ids.first,
        shard_ids.table.to(logits.device),
    )
    return ShardSample(scores, tokens, largest, sums.double())


def sample_shard_by_reference(
    logits: torch.Tensor,
    temperatures: Sequence[float] | Float32Array,
    keys: Sequence[Key] | UInt32Array,
    shard_ids: ShardIds,
) -> ShardSample:
    """The CPU path; arguments as in `sample_shard`."""
    shard, rows = ShardLogits(logits, shard_ids), np.arange(len(temperatures))
    divisors = np.asarray(temperatures, dtype=np.float32)
    best = shard.best(rows, divisors, np.asarray(keys, dtype=np.uint32).reshape(-1, 2), 1)
    values, ids = unpack_tokens(best[:, 0])
    divisors = np.where(divisors == 0.0, np.float32(1.0), divisors)
    maxima = shard.maxima(rows)
    finite = np.maximum(maxima, np.finfo(np.float32).min)  # a shard of removed tokens has no mass
    return ShardSample(
        torch.from_numpy(values),
        torch.from_numpy(ids),
        torch.from_numpy(maxima / divisors),
        torch.from_numpy(shard.exp_sums(rows, finite, divisors)),
    )
