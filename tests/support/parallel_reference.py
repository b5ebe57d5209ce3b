"""A parallel drafter run over a whole text with dense attention: no cache, no pages, no kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.workers.draft_heads.parallel import ParallelDrafter


def rotated(drafter: ParallelDrafter, x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * drafter.shape.rope.theta ** (-torch.arange(half) / half)
    first, second = x.split(half, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
    )


def visible(drafter: ParallelDrafter, layer: int, num_context: int) -> Tensor:
    """bool [block, num_context + block], written out slot by slot."""
    own, size = drafter.shape.layers[layer], drafter.shape.block_size
    seen = torch.zeros(size, num_context + size, dtype=torch.bool)
    for slot in range(size):
        at = num_context + (0 if own.window_from_anchor else slot)
        for key in range(num_context):
            seen[slot, key] = not own.window or at - key < own.window
        for other in range(size):
            seen[slot, num_context + other] = other <= slot or not own.is_causal
    return seen


@torch.inference_mode()
def block_output(drafter: ParallelDrafter, embedding: Tensor, taps: Tensor, anchor: int) -> Tensor:
    """[num_levels, hidden] of a block behind the tokens of which there are taps [n, taps * hidden]."""
    shape = drafter.shape
    features, num_context = drafter.features(taps), len(taps)
    positions = torch.arange(num_context + shape.block_size)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        context_k, context_v = drafter.context(layer, features)
        keys = rotated(drafter, torch.cat([context_k, k]), positions).repeat_interleave(group, dim=1)
        values = torch.cat([context_v, v]).repeat_interleave(group, dim=1)
        queries = rotated(drafter, q, positions[num_context:])
        scores = torch.einsum("nhd,mhd->hnm", queries, keys) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible(drafter, layer, num_context), -torch.inf)
        return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values).flatten(1)

    read = [anchor, *[shape.mask_token_id] * (shape.block_size - 1)]
    return drafter(embedding[read], attend)[0]


@torch.inference_mode()
def logits_after(
    drafter: ParallelDrafter, embedding: Tensor, taps: Tensor, tokens: Sequence[int], path: Sequence[int]
) -> Tensor:
    """float32 logits [V'] after known tokens and a drafted path.

    Args:
        taps: [len(tokens) - 1 at least, taps * hidden], the target's rows side by side.
        tokens: known ones; path: below the last of them, shorter than there are levels.
    """
    output = block_output(drafter, embedding, taps[: len(tokens) - 1], tokens[-1])[len(path), None]
    previous = torch.tensor([[*tokens, *path][-1]])
    return drafter.with_pair(drafter.logits(output), drafter.pair_rows(previous, output))[0]
