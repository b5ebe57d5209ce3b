"""How the reference attention walks a batch: which rows it gathers and what each query may see.

Built once per forward from the trees (`TreeBatch.plan`), so that a layer does a few tensor calls whatever the
number of sequences. Sequences with few queries are padded to one call; a long chain (a prompt chunk) gets its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Up to this many queries of a sequence the query heads of a KV head are folded into rows (K and V are then read
# once per KV head) and sequences share a call; above it the copies cost more than they save.
MAX_FOLDED_QUERIES = 64

MaskKey = tuple[int, int, torch.dtype]


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences attended in one call: n of them, padded to T queries and S keys.

    Attributes:
        num_sequences, num_queries, num_keys: n, T, S.
        query_rows: int64 [n * T] rows of q; padding repeats a sequence's first row. Ignored when `contiguous`.
        contiguous: the n * T query rows lie back to back from `first_query`, nothing is padded.
        first_query: see `contiguous`.
        output_rows: int64, which of the n * T padded rows are real, in the order of `target_rows`.
        target_rows: int64, the row of the output each of them goes to.
        key_rows: int64 [n * S] cache rows; padding repeats a sequence's first row, so that nothing outside its
            own rows (unused pages may hold NaN) is ever read. Ignored when `consecutive`.
        consecutive: one sequence whose rows lie back to back in the cache from row `first_key_row`: no gather.
        visible: bool [n, T, S], which keys each query may see without a window.
        key_distance: int32 [n, T, S], positions between a query and a visible key.
        masks: additive masks made so far, by (window, rows per query, dtype).
    """

    num_sequences: int
    num_queries: int
    num_keys: int
    query_rows: Tensor
    contiguous: bool
    first_query: int
    output_rows: Tensor
    target_rows: Tensor
    key_rows: Tensor
    consecutive: bool
    first_key_row: int
    visible: Tensor
    query_positions: Tensor
    key_positions: Tensor
    masks: dict[MaskKey, Tensor] = field(default_factory=dict)

    @property
    def folded(self) -> bool:
        return self.num_queries <= MAX_FOLDED_QUERIES

    def mask(self, window: int, repeat: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [n, 1, T * repeat, S], 0 or -inf; each query's row comes `repeat` times in a row."""
        key = (window, repeat, dtype)
        if key not in self.masks:
            visible = self.visible
            if window > 0:
                distance = self.query_positions[:, :, None] - self.key_positions
                visible = visible & (distance < window)
            rows = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
                ~visible, float("-inf")
            )
            self.masks[key] = rows.repeat_interleave(repeat, dim=1)[:, None]
        return self.masks[key]


@dataclass(frozen=True)
class AttentionPlan:
    """All groups of a batch; `single` when one contiguous group is the whole batch, in order."""

    groups: tuple[AttentionGroup, ...]

    @property
    def single(self) -> bool:
        return len(self.groups) == 1 and self.groups[0].contiguous


def _grouped(
    context_lens: Sequence[int], tree_lens: Sequence[int], query_lens: Sequence[int]
) -> list[list[int]]:
    """Sequence indices per call: long chains alone, the others by key count so that padding at most doubles it."""
    groups = [[b] for b, n in enumerate(query_lens) if n > MAX_FOLDED_QUERIES]
    small = [b for b, n in enumerate(query_lens) if 0 < n <= MAX_FOLDED_QUERIES]
    num_keys = [c + t for c, t in zip(context_lens, tree_lens, strict=True)]
    current: list[int] = []
    for b in sorted(small, key=lambda b: (-num_keys[b], b)):
        if current and 2 * num_keys[b] < num_keys[current[0]]:
            groups.append(sorted(current))
            current = []
        current.append(b)
    if current:
        groups.append(sorted(current))
    return groups


def build_attention_plan(
    page_table: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    page_size: int,
    context_lens: Sequence[int],
    tree_lens: Sequence[int],
    query_lens: Sequence[int],
) -> AttentionPlan:
    """Plan of the reference attention; arguments as in `TreeBatch` (the integers on the host)."""
    device = ancestors.device
    pages = page_table.cpu().numpy().astype(np.int64)
    words = ancestors.cpu().numpy()
    query_depths = depths.cpu().numpy()
    starts = np.concatenate(([0], np.cumsum(query_lens))).tolist()

    def places_of(b: int) -> np.ndarray:
        rows = np.arange(context_lens[b] + tree_lens[b])
        return pages[b, rows // page_size] * page_size + rows % page_size

    def group_of(members: list[int]) -> AttentionGroup:
        n = len(members)
        T = max(query_lens[b] for b in members)
        S = max(context_lens[b] + tree_lens[b] for b in members)
        query_rows = np.empty((n, T), dtype=np.int64)
        key_rows = np.empty((n, S), dtype=np.int64)
        visible = np.zeros((n, T, S), dtype=bool)
        query_positions = np.zeros((n, T), dtype=np.int32)
        key_positions = np.zeros((n, T, S), dtype=np.int32)
        output_rows: list[np.ndarray] = []
        target_rows: list[np.ndarray] = []
        for i, b in enumerate(members):
            context, tree, num = context_lens[b], tree_lens[b], query_lens[b]
            rows = np.arange(starts[b], starts[b] + num)
            query_rows[i] = starts[b]
            query_rows[i, :num] = rows
            places = places_of(b)
            key_rows[i] = places[0]
            key_rows[i, : len(places)] = places
            bits = np.unpackbits(np.ascontiguousarray(words[rows]).view(np.uint8), axis=1, bitorder="little")[
                :, :tree
            ]
            visible[i, :num, :context] = True
            visible[i, :num, context : context + tree] = bits
            visible[i, num:] = visible[i, 0]
            # Rows are in topological order, so an ancestor's depth is its rank on the path.
            ranks = np.cumsum(bits, axis=1, dtype=np.int32) - 1
            key_positions[i, :, :context] = np.arange(context)
            key_positions[i, :num, context : context + tree] = context + ranks
            query_positions[i, :num] = context + query_depths[rows]
            output_rows.append(i * T + np.arange(num))
            target_rows.append(rows)
        flat = query_rows.reshape(-1)
        only = places_of(members[0]) if n == 1 else np.zeros(0, dtype=np.int64)
        return AttentionGroup(
            num_sequences=n,
            num_queries=T,
            num_keys=S,
            query_rows=torch.from_numpy(flat).to(device),
            contiguous=bool((np.diff(flat) == 1).all()),
            first_query=int(flat[0]),
            output_rows=torch.from_numpy(np.concatenate(output_rows)).to(device),
            target_rows=torch.from_numpy(np.concatenate(target_rows)).to(device),
            key_rows=torch.from_numpy(key_rows.reshape(-1)).to(device),
            consecutive=n == 1 and bool((np.diff(only) == 1).all()),
            first_key_row=int(key_rows[0, 0]),
            visible=torch.from_numpy(visible).to(device),
            query_positions=torch.from_numpy(query_positions).to(device),
            key_positions=torch.from_numpy(key_positions).to(device),
        )

    return AttentionPlan(tuple(group_of(g) for g in _grouped(context_lens, tree_lens, query_lens)))
