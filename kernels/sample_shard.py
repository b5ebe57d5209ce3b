"""One token per row of a rank's shard of the vocabulary: the argmax of logit / temperature + Gumbel(key, id), ties to
the smaller id. `ShardLogits` is the CPU path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.launch_plans import LaunchPlan, launch
from outrider.kernels.noise import Float32Array, Key, UInt32Array
from outrider.kernels.shapes import check_kernel_arguments, check_shapes
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.shard_logits import ShardLogits
from outrider.kernels.token_rows import unpack_tokens
from outrider.kernels.transfers import upload


class ShardSample(NamedTuple):
    """The best token of each row within a shard."""

    values: Tensor  # float32 [num_rows]: logit / temperature + noise; the logit at temperature 0
    ids: Tensor  # int64 [num_rows]: ids of the whole vocabulary
    maxima: Tensor  # float32 [num_rows]: the largest logit / temperature; temperature 0 counts as 1
    exp_sums: Tensor  # float64 [num_rows]: sum over the shard of exp(logit / temperature - maximum)


def sample_shard(
    logits: Tensor,
    temperatures: Sequence[float] | Float32Array | Tensor,
    keys: Sequence[Key] | UInt32Array | Tensor,
    shard_ids: ShardIds,
    use_kernel: bool = False,
) -> ShardSample:
    """The best token of each row of a shard, as above.

    Args:
        logits: float32 [num_rows, shard_size], processed; -inf removes a token.
        temperatures: one per row; 0 takes the largest logit without noise. Of these and keys, tensors are where the
            logits are: float32 [num_rows] and int64 [num_rows, 2].
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
    if use_kernel:
        check_shapes((("logits", logits, ("num_rows", "shard_size")),))
        check_kernel_arguments((("logits", logits, torch.float32),))
        if not (isinstance(temperatures, Tensor) and isinstance(keys, Tensor)):
            settings = (
                torch.from_numpy(np.array(temperatures, dtype=np.float32)),
                torch.from_numpy(np.array(keys, dtype=np.int64).reshape(-1, 2)),
            )
            temperatures, keys = upload(settings, logits.device)
        scores, tokens, largest, sums = sample_shard_op(
            logits, temperatures, keys, shard_ids.first, shard_ids.table_on(logits.device)
        )
        return ShardSample(scores, tokens, largest, sums.double())
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


@custom_op("outrider::sample_shard", mutates_args=(), device_types="cpu")
def sample_shard_op(
    logits: Tensor, temperatures: Tensor, keys: Tensor, vocab_offset: int, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With temperatures and keys as tensors, and ids as `plan_sample_shard` takes them; on a CPU the reference."""
    ids = ShardIds(table) if len(table) else ShardIds.from_first(vocab_offset, logits.shape[1])
    sample = sample_shard(logits, temperatures.numpy(), keys.numpy().astype(np.uint32), ids)
    return sample.values, sample.ids, sample.maxima, sample.exp_sums.float()


@sample_shard_op.register_fake
def _empty(logits: Tensor, *rest: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (logits.shape[0],)
    scores, largest, sums = (logits.new_empty(rows) for _ in range(3))
    return scores, logits.new_empty(rows, dtype=torch.int64), largest, sums


@sample_shard_op.register_kernel("cuda")
def sample_shard_on_gpu(
    logits: Tensor, temperatures: Tensor, keys: Tensor, vocab_offset: int, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty(logits)
    if logits.shape[0] > 0:
        launch(logits.device, [plan_sample_shard(logits, temperatures, keys, vocab_offset, table, *outputs)])
    return outputs


def plan_sample_shard(
    logits: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    vocab_offset: int,
    table: Tensor,
    scores: Tensor,
    tokens: Tensor,
    largest: Tensor,
    exponential_sums: Tensor,
) -> LaunchPlan:
    """A block per row.

    Args:
        logits: float32 [num_rows, shard_size]; temperatures: float32 [num_rows], 0 = no noise; keys: int64
            [num_rows, 2], the halves of `noise_key`; vocab_offset: token id of column 0; table: int64
            [shard_size], the token id of each column, ascending, or no elements where they are consecutive.
        scores, tokens, largest, exponential_sums: outputs float32, int64, float32, float32 [num_rows].
    """
    num_rows, vocab_size = logits.shape
    return LaunchPlan(
        source="sample_shard",
        kernel="sample_shard",
        grid=(num_rows, 1, 1),
        block=512,
        shared_bytes=16 * (16 + 4 + 4),  # of each of 16 warps: (score, token), largest, sum
        arguments=(
            logits,
            keys,
            temperatures,
            table if len(table) else np.int64(0),
            scores,
            tokens,
            largest,
            exponential_sums,
            np.int32(vocab_size),
            np.int64(vocab_offset),
            np.int64(logits.stride(0)),
        ),
    )
