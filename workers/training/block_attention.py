"""Blocks at many places of texts at once: which they are, and attention of their slots.

The literal picture, tokens a b c d e f at positions 0..5, labels from c on, blocks of 3 slots whose slot 0 guesses:

    anchor 1 (b): sees the target's row of a;     slots b _ _ at positions 1 2 3 guess c d e
    anchor 3 (d): sees the rows of a b c;         slots d _ _ at positions 3 4 5 guess e f

An anchor's own row is not seen, because a server does not have it either: it is made by the round that is drafted
for. Where slot 0 guesses nothing, slots 1 and 2 guess those tokens (c d, e f).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.workers.draft_heads.parallel import BlockLayer


@dataclass(frozen=True)
class Blocks:
    """Blocks of one batch, those of a text together; A of them, none where a text has nothing to guess.

    Attributes:
        anchors: int64 [A], index of each block's anchor into the batch's tokens.
        places: int64 [A], of the anchor within its text: its position.
        learned: bool [A, K], which levels guess a label; never one behind a level that does not.
        by_text: of each text its first token, number of tokens, first block and number of blocks.
    """

    anchors: Tensor
    places: Tensor
    learned: Tensor
    by_text: list[tuple[int, int, int, int]]


def plan_blocks(
    lengths: Sequence[int], is_label: Tensor, num_levels: int, most: int, generator: torch.Generator
) -> Blocks:
    """At most `most` blocks of each text, at random anchors whose next token is a label."""
    anchors, places, learned, by_text = [], [], [], []
    start = num_blocks = 0
    for length in lengths:
        labels = is_label[start : start + length]
        ahead = labels.new_zeros(length, num_levels)  # whether the token k + 1 places on is a label
        for level in range(min(num_levels, length - 1)):
            ahead[: length - level - 1, level] = labels[level + 1 :]
        ahead = ahead.cumprod(dim=1).bool()
        candidates = ahead[:, 0].nonzero().squeeze(1)
        order = torch.randperm(len(candidates), generator=generator)[:most]
        chosen = candidates[order.sort().values]
        anchors.append(chosen + start)
        places.append(chosen)
        learned.append(ahead[chosen])
        by_text.append((start, length, num_blocks, len(chosen)))
        start, num_blocks = start + length, num_blocks + len(chosen)
    return Blocks(torch.cat(anchors), torch.cat(places), torch.cat(learned), by_text)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, blocks: Blocks, layer: BlockLayer
) -> Tensor:
    """Every slot attends to the rows of its text before its anchor and to the slots of its block that it sees.

    Args:
        q: [A * S, HQ, D], k, v: [A * S, HK, D], of slots; after rotary embedding.
        context_k, context_v: [N, HK, D] of the batch's tokens.

    Returns:
        [A * S, HQ * D].
    """
    num_slots, (_, HK, D) = len(q) // len(blocks.anchors), k.shape
    G = q.shape[1] // HK
    q = (q * D**-0.5).view(-1, num_slots, HK, G, D)
    k, v = k.view(-1, num_slots, HK, D), v.view(-1, num_slots, HK, D)
    slots = torch.arange(num_slots, device=q.device)
    behind = slots[:, None] - slots  # of a slot, how far each other is before it
    hidden = (behind < 0) & layer.is_causal
    if layer.window:
        hidden = hidden | (behind >= layer.window)
    out = torch.empty_like(q)
    for first, length, first_block, num_blocks in blocks.by_text:
        if not num_blocks:
            continue
        own = slice(first_block, first_block + num_blocks)
        length = min(length, int(blocks.places[own].max()))  # what nobody sees
        places = blocks.places[own].to(q.device)
        rows = slice(first, first + length)
        queries = q[own].permute(2, 0, 1, 3, 4)  # [HK, A, S, G, D]
        far = queries.reshape(HK, -1, D) @ context_k[rows].permute(1, 2, 0)  # [HK, A * S * G, T]
        far = far.view(HK, num_blocks, num_slots, G, length)
        keys = k[own].permute(2, 0, 3, 1)  # [HK, A, D, S]
        near = (queries.reshape(HK, num_blocks, -1, D) @ keys).view(HK, num_blocks, num_slots, G, num_slots)
        tokens = torch.arange(length, device=q.device)
        unseen = (tokens >= places[:, None])[:, None]  # [A, 1, T]
        if layer.window:
            at = places[:, None] + (torch.zeros_like(slots) if layer.window_from_anchor else slots)
            unseen = unseen | (at[:, :, None] - tokens >= layer.window)
        far = far.float().masked_fill(unseen[:, :, None], -torch.inf)
        near = near.float().masked_fill(hidden[:, None], -torch.inf)
        weights = torch.cat((far, near), dim=-1).softmax(-1).to(v.dtype)
        far, near = weights.split((length, num_slots), dim=-1)
        seen = far.reshape(HK, -1, length) @ context_v[rows].transpose(0, 1)  # [HK, A * S * G, D]
        beside = near.reshape(HK, num_blocks, -1, num_slots) @ v[own].permute(2, 0, 1, 3)
        both = seen.view(HK, num_blocks, num_slots, G, D) + beside.view(HK, num_blocks, num_slots, G, D)
        out[own] = both.permute(1, 2, 0, 3, 4).to(out.dtype)
    return out.flatten(0, 1).flatten(1)
