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

from outrider.kernels.transfers import upload
from outrider.workers.draft_heads.parallel import BlockLayer

# Scores of texts that are attended to at once: on a CPU about one text's, which stay near the processor, on a GPU a
# whole batch's. Elements for each head.
_SCORES = {"cpu": 1 << 17, "cuda": 1 << 24}


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

    def by_level(self) -> list[tuple[Tensor, Tensor]]:
        """Of each level, int64 [M] each: which of the A * K guesses are learned, a block's back to back, and the
        places in the batch's tokens whose laws they guess."""
        num_levels = self.learned.shape[1]
        found = []
        for level in range(num_levels):
            which = self.learned[:, level].nonzero().squeeze(1)
            found.append((which * num_levels + level, self.anchors[which] + level))
        return found


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


@dataclass(frozen=True)
class _Group:
    """Some texts side by side, padded to the longest: B texts of at most A' blocks and T rows that a block sees.

    Attributes:
        blocks: int64 [B * A'], of each line of blocks which it is; any where it is padding.
        rows: int64 [B * T], index into the batch's tokens; any where it is padding.
        places: int64 [B, A'], of the anchors within their texts; 0 where there is no block.
        real: int64, which of the B * A' are blocks.
    """

    blocks: Tensor
    rows: Tensor
    places: Tensor
    real: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Which texts are attended to at once.

    Attributes:
        num_slots: of a block.
    """

    num_slots: int
    groups: list[_Group]


def plan_attention(blocks: Blocks, num_slots: int, device: torch.device) -> AttentionPlan:
    """Texts in their order, as many at a time as the device likes; arrays on the device."""
    sizes = []  # of each text with blocks: first token, rows that any block sees, first block, number of blocks
    for first, length, first_block, num_blocks in blocks.by_text:
        if num_blocks:
            seen = min(length, int(blocks.places[first_block : first_block + num_blocks].max()))
            sizes.append((first, seen, first_block, num_blocks))
    groups: list[list[tuple[int, int, int, int]]] = []
    most_blocks = most_rows = 0
    for text in sizes:
        most_blocks, most_rows = max(most_blocks, text[3]), max(most_rows, text[1])
        within = (
            groups and (len(groups[-1]) + 1) * most_blocks * num_slots * most_rows <= _SCORES[device.type]
        )
        if within:
            groups[-1].append(text)
        else:
            groups.append([text])
            most_blocks, most_rows = text[3], text[1]
    arrays: list[Tensor] = []
    for group in groups:
        first, seen, first_block, num_blocks = torch.tensor(group).T
        lines, rows = torch.arange(int(num_blocks.max())), torch.arange(int(seen.max()))
        is_block = lines < num_blocks[:, None]
        which = torch.where(is_block, first_block[:, None] + lines, first_block[:, None])
        arrays += [
            which.flatten(),
            (first[:, None] + rows.minimum(seen[:, None] - 1)).flatten(),
            torch.where(is_block, blocks.places[which], 0),
            is_block.flatten().nonzero().squeeze(1),
        ]
    arrays = upload(arrays, device)
    return AttentionPlan(num_slots, [_Group(*arrays[i : i + 4]) for i in range(0, len(arrays), 4)])


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    plan: AttentionPlan,
    layer: BlockLayer,
) -> Tensor:
    """Every slot attends to the rows of its text before its anchor and to the slots of its block that it sees.

    Args:
        q: [A * S, HQ, D], k, v: [A * S, HK, D], of slots; after rotary embedding.
        context_k, context_v: [N, HK, D] of the batch's tokens.

    Returns:
        [A * S, HQ * D].
    """
    S, (_, HK, D) = plan.num_slots, k.shape
    G = q.shape[1] // HK
    q = (q * D**-0.5).view(-1, S, HK, G, D)
    k, v = k.view(-1, S, HK, D), v.view(-1, S, HK, D)
    slots = torch.arange(S, device=q.device)
    behind = slots[:, None] - slots  # of a slot, how far each other is before it
    hidden = (behind < 0) & layer.is_causal
    if layer.window:
        hidden = hidden | (behind >= layer.window)
    out = []
    for group in plan.groups:
        B, A = group.places.shape

        def of_blocks(x: Tensor, group: _Group = group, B: int = B, A: int = A) -> Tensor:
            return x.index_select(0, group.blocks).unflatten(0, (B, A))

        def of_context(x: Tensor, group: _Group = group, B: int = B) -> Tensor:
            return x.index_select(0, group.rows).unflatten(0, (B, -1))

        queries = of_blocks(q).permute(0, 3, 1, 2, 4, 5)  # [B, HK, A, S, G, D]
        far = queries.reshape(B, HK, A * S * G, D) @ of_context(context_k).permute(0, 2, 3, 1)
        far = far.unflatten(2, (A, S, G))  # [B, HK, A, S, G, T]
        near = queries.reshape(B, HK, A, S * G, D) @ of_blocks(k).permute(0, 3, 1, 4, 2)
        near = near.unflatten(3, (S, G))  # [B, HK, A, S, G, S]
        T = far.shape[-1]
        tokens, places = torch.arange(T, device=q.device), group.places
        unseen = (tokens >= places[..., None])[:, :, None]  # [B, A, 1, T]
        if layer.window:
            at = places[..., None] + (torch.zeros_like(slots) if layer.window_from_anchor else slots)
            unseen = unseen | (at[..., None] - tokens >= layer.window)
        far = far.float().masked_fill(unseen[:, None, :, :, None], -torch.inf)
        near = near.float().masked_fill(hidden[:, None], -torch.inf)
        weights = torch.cat((far, near), dim=-1).softmax(-1).to(v.dtype)
        far, near = weights.split((T, S), dim=-1)
        seen = far.reshape(B, HK, A * S * G, T) @ of_context(context_v).permute(0, 2, 1, 3)
        beside = near.reshape(B, HK, A, S * G, S) @ of_blocks(v).permute(0, 3, 1, 2, 4)
        both = seen.unflatten(2, (A, S, G)) + beside.unflatten(3, (S, G))
        both = both.permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # [B * A, S, HK, G, D]
        out.append(both.index_select(0, group.real))
    return torch.cat(out).flatten(0, 1).flatten(1)
