"""An EAGLE-3 drafter run over a whole text with dense attention: no cache, no pages, no trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.workers.draft_heads.eagle3 import Eagle3Drafter


class _DenseAttention:
    """Rows one behind the other; each sees those before it and itself."""

    def __init__(self, drafter: Eagle3Drafter) -> None:
        self._theta = drafter.shape.rope.theta
        self._keys = self._values = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin, group = len(self._keys), q.shape[1] // k.shape[1]
        positions = torch.arange(begin, begin + len(q))
        q, k = self._rotated(q, positions), self._rotated(k, positions)
        self._keys = torch.cat([self._keys, k]) if begin else k
        self._values = torch.cat([self._values, v]) if begin else v
        keys, values = (x.repeat_interleave(group, dim=1) for x in (self._keys, self._values))
        scores = torch.einsum("nhd,mhd->hnm", q, keys) * q.shape[-1] ** -0.5
        hidden = torch.arange(len(keys)) > positions[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, values).flatten(1)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = positions[:, None, None] * self._theta ** (-torch.arange(half) / half)
        first, second = x.split(half, dim=-1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )


@torch.inference_mode()
def logits_along(
    drafter: Eagle3Drafter, embedding: Tensor, taps: Tensor, tokens: Sequence[int], path: Sequence[int]
) -> Tensor:
    """float32 logits [len(tokens) + len(path) - 1, V']: after each token but the first, and each of a drafted path.

    Args:
        taps: [len(tokens) - 1 at least, taps * hidden], the target's rows side by side.
        tokens: known ones; path: below the last of them.
    """
    attend, known = _DenseAttention(drafter), len(tokens) - 1
    outputs = [drafter(embedding[list(tokens[1:])], drafter.features(taps[:known]), attend)]
    for token in path:
        outputs.append(drafter(embedding[[token]], outputs[-1][-1:], attend))
    return drafter.logits(torch.cat(outputs))
