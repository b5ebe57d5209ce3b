"""One rank's logits as sampling looks at them: on the host, or where a GPU left them.

Both answer the same questions for several rows at a time, with the same numbers but for the rounding of exp and
log: all ranks of a group use the same kind (`agreed_kernels`). A `DeviceShard` brings answers to the host, never
whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.noise import Float32Array, Int64Array, Key
from outrider.kernels.sample_shard import ShardLogits, UInt64Array, pack_tokens, sample_shard
from outrider.kernels.selection import KernelSelection

REMOVED = pack_tokens(np.array([-np.inf], dtype=np.float32), np.zeros(1, dtype=np.int64))[0]
"""Packed tokens from here on have value -inf."""


class Shard(Protocol):
    """Logits of several rows over the token ids of one rank; packed tokens are those of `pack_tokens`."""

    def has(self, token: int) -> bool:
        """Whether a token id is in this shard."""
        ...

    def logits(self, rows: Sequence[int], ids: Int64Array) -> Float32Array:
        """[n]: the logit of ids[i] in rows[i]; the ids are in this shard."""
        ...

    def maxima(self, rows: Sequence[int]) -> Float32Array:
        """[n]: the largest logit of each row."""
        ...

    def exp_sums(self, rows: Sequence[int], temperatures: Sequence[float]) -> np.ndarray:
        """float64 [n]: of each row the sum of exp((logit - largest logit) / temperature)."""
        ...

    def top(self, rows: Sequence[int], count: int) -> list[UInt64Array]:
        """Of each row the `count` likeliest tokens (all, if there are fewer), packed with their logits, in order."""
        ...

    def best(
        self, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[Key], count: int
    ) -> list[UInt64Array]:
        """Of each row the `count` best tokens by logit / temperature + noise, packed with their scores, in order.

        Temperature 0 ranks by the logits alone. `count` is at most the size of the shard.
        """
        ...


class HostShard:
    """A shard in the host's memory. `logits` [num_rows, shard_size] must not change while this is in use."""

    def __init__(self, logits: torch.Tensor, vocab_offset: int) -> None:
        self._shard = ShardLogits(logits, vocab_offset)

    def has(self, token: int) -> bool:
        return self._shard.has(token)

    def logits(self, rows: Sequence[int], ids: Int64Array) -> Float32Array:
        return self._shard.logits(np.asarray(rows, dtype=np.int64), ids)

    def maxima(self, rows: Sequence[int]) -> Float32Array:
        return np.array([self._shard.maximum(row) for row in rows], dtype=np.float32)

    def exp_sums(self, rows: Sequence[int], temperatures: Sequence[float]) -> np.ndarray:
        return np.array([self._shard.exp_sum(*each) for each in zip(rows, temperatures, strict=True)])

    def top(self, rows: Sequence[int], count: int) -> list[UInt64Array]:
        return [self._shard.top(row, count) for row in rows]

    def best(
        self, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[Key], count: int
    ) -> list[UInt64Array]:
        return [self._shard.best(*each, count) for each in zip(rows, temperatures, keys, strict=True)]


class DeviceShard:
    """A shard that stays on its device. `logits` [num_rows, shard_size] must not change while this is in use."""

    def __init__(self, logits: torch.Tensor, vocab_offset: int, kernels: KernelSelection) -> None:
        """`kernels`: has `sample_shard`."""
        assert kernels.sample_shard
        self._logits = logits
        self._vocab_offset = vocab_offset
        self._kernels = kernels

    def has(self, token: int) -> bool:
        return self._vocab_offset <= token < self._vocab_offset + self._logits.shape[1]

    def logits(self, rows: Sequence[int], ids: Int64Array) -> Float32Array:
        columns = self._tensor(ids - self._vocab_offset, torch.int64)
        return self._logits[self._tensor(rows, torch.int64), columns].cpu().numpy()

    def maxima(self, rows: Sequence[int]) -> Float32Array:
        return self._rows(rows).amax(dim=1).cpu().numpy()

    def exp_sums(self, rows: Sequence[int], temperatures: Sequence[float]) -> np.ndarray:
        part = self._rows(rows)
        x = part - part.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        x *= self._tensor([1.0 / temperature for temperature in temperatures], torch.float32)[:, None]
        return x.exp_().sum(dim=1, dtype=torch.float64).cpu().numpy()

    def top(self, rows: Sequence[int], count: int) -> list[UInt64Array]:
        part = self._rows(rows)
        # `pack_tokens` upside down, so that it fits into a signed integer: no two are equal.
        bits = (part + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**32
        first, end = self._vocab_offset, self._vocab_offset + part.shape[1]
        rising += 0xFFFFFFFF - torch.arange(first, end, device=part.device)
        largest = rising.topk(min(count, part.shape[1]), dim=1).values.cpu().numpy()
        return list(np.uint64(2**63 - 1) - largest.view(np.uint64))

    def best(
        self, rows: Sequence[int], temperatures: Sequence[float], keys: Sequence[Key], count: int
    ) -> list[UInt64Array]:
        part = self._rows(rows)
        if count > 1:
            part = part.clone()
        first, end = self._vocab_offset, self._vocab_offset + part.shape[1]
        values, ids = [], []
        for remaining in reversed(range(count)):
            sample = sample_shard(part, list(temperatures), list(keys), first, use_kernel=True)
            values.append(sample.values)
            # A row of NaN has no best token; it must not make the device read out of bounds.
            ids.append(sample.ids.clamp(first, end - 1))
            if remaining:  # the winner leaves, the next one is sought
                part.scatter_(1, ids[-1][:, None] - first, -torch.inf)
        packed = pack_tokens(torch.stack(values, 1).cpu().numpy(), torch.stack(ids, 1).cpu().numpy())
        # Winners that left are like removed tokens: where these come into play, the host tells them apart.
        for i in np.flatnonzero(packed[:, -1] >= REMOVED).tolist() if count > 1 else ():
            host = HostShard(self._rows([rows[i]]).cpu(), self._vocab_offset)
            (found,) = host.best([0], [temperatures[i]], [keys[i]], count)
            packed[i, : len(found)] = found  # nothing in a row of NaN
        return list(packed)

    def _rows(self, rows: Sequence[int]) -> torch.Tensor:
        if list(rows) == list(range(len(self._logits))):
            return self._logits
        return gather_rows(self._logits, self._tensor(rows, torch.int64), self._kernels.gather_rows)

    def _tensor(self, values: Sequence[float] | Int64Array, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype, device=self._logits.device)
