"""Removes from rows of logits what a request's text forbids, where the logits are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from outrider.kernels.shard_ids import ShardIds
from outrider.workers.sampling.context import SampledRows


class Masked(NamedTuple):
    """What `mask_rows` overwrote: logits float32 [num_masked, shard_size] of rows int64 [num_masked]."""

    rows: torch.Tensor
    logits: torch.Tensor

    def undo(self, logits: torch.Tensor) -> None:
        if self.rows.numel():
            logits[self.rows] = self.logits


NOTHING_MASKED = Masked(torch.empty(0, dtype=torch.int64), torch.empty(0, 0))


def mask_rows(logits: torch.Tensor, groups: Sequence[SampledRows], shard_ids: ShardIds) -> Masked:
    """Put -inf in place for every token that is not among those allowed in its row; of a shard's tokens alone.

    Args:
        logits: float32 [num_rows, shard_size].
        shard_ids: the token of each column.
        groups: what the rows are sampled for, in their order.
    """
    words, rows, end = [], [], 0
    for group in groups:
        first, end = end, end + len(group.positions)
        if len(group.allowed):
            words.append(group.allowed)
            rows.append(np.arange(first, end))
    if not words:
        return NOTHING_MASKED
    device = logits.device
    index = torch.from_numpy(np.concatenate(rows)).to(device)
    original = logits[index]
    is_allowed = _among(
        torch.from_numpy(np.concatenate(words)).to(device), torch.from_numpy(shard_ids.all).to(device)
    )
    logits[index] = original.masked_fill(~is_allowed, -torch.inf)
    return Masked(index, original)


def _among(words: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """bool [num_sets, num_ids]: whether sets of tokens, int32 [num_sets, num_words], have these."""
    return ((words[:, ids >> 5] >> (ids & 31).int()) & 1).bool()
