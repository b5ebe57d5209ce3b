"""From sequences to the tensors of one forward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.tree_batch import MASK_WORD_BITS, TreeBatch


@dataclass(frozen=True)
class SequenceRows:
    """One sequence's share of a forward.

    Attributes:
        pages: page ids, enough for context_len + len(parents) rows.
        context_len: committed rows in the cache.
        parents: for each tree row, already cached or new, the row of its parent; parents come first. The root is
            row 0 and is its own parent. A prompt chunk is the chain [0, 0, 1, 2, ...].
        num_cached: how many of the first tree rows are in the cache already.
        tokens: token ids of the other rows, the queries: len(parents) - num_cached of them.
    """

    pages: Sequence[int]
    context_len: int
    parents: Sequence[int]
    num_cached: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class ForwardBatch:
    """The rows of one forward, sequences back to back.

    Attributes:
        tokens, positions, slots: int64 [N]; slot = page * page_size + offset, where the row's KV is written.
        tree: what attention knows.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    tree: TreeBatch


def chain(num_rows: int) -> list[int]:
    """Parents of a chain of rows: [0, 0, 1, 2, ...]."""
    return [0, *range(num_rows - 1)]


def build_batch(sequences: Sequence[SequenceRows], page_size: int, device: torch.device) -> ForwardBatch:
    """Lays the queries of all sequences out for one forward."""
    context_lens = [s.context_len for s in sequences]
    tree_lens = [len(s.parents) for s in sequences]
    query_lens = [len(s.tokens) for s in sequences]
    num_words = max(1, -(-max(tree_lens) // MASK_WORD_BITS))
    max_pages = max(len(s.pages) for s in sequences)
    page_table = np.zeros((len(sequences), max_pages), dtype=np.int32)
    tokens: list[int] = []
    depths: list[int] = []
    slots: list[np.ndarray] = []
    masks: list[bytes] = []
    for b, rows in enumerate(sequences):
        assert len(rows.parents) == rows.num_cached + len(rows.tokens), (
            "a query per tree row that is not cached"
        )
        assert len(rows.pages) * page_size >= rows.context_len + len(rows.parents), (
            "too few pages for the rows"
        )
        pages = np.asarray(rows.pages, dtype=np.int64)
        page_table[b, : len(pages)] = pages
        tokens += rows.tokens
        row_depths, row_masks = _depths_and_masks(rows.parents)
        depths += row_depths[rows.num_cached :]
        masks += [mask.to_bytes(8 * num_words, "little") for mask in row_masks[rows.num_cached :]]
        new = np.arange(rows.context_len + rows.num_cached, rows.context_len + len(rows.parents))
        slots.append(pages[new // page_size] * page_size + new % page_size)
    depth_array = np.array(depths, dtype=np.int32)
    ancestors = np.frombuffer(bytearray(b"".join(masks)), dtype=np.int64).reshape(len(tokens), num_words)
    positions = np.repeat(np.array(context_lens, dtype=np.int64), query_lens) + depth_array

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    tree = TreeBatch(
        page_table=tensor(page_table),
        context_lens=tensor(np.array(context_lens, dtype=np.int32)),
        tree_lens=tensor(np.array(tree_lens, dtype=np.int32)),
        query_indptr=tensor(np.cumsum([0, *query_lens], dtype=np.int32)),
        ancestors=tensor(ancestors),
        depths=tensor(depth_array),
        page_size=page_size,
        host_context_lens=tuple(context_lens),
        host_tree_lens=tuple(tree_lens),
        host_query_lens=tuple(query_lens),
    )
    return ForwardBatch(
        tokens=tensor(np.array(tokens, dtype=np.int64)),
        positions=tensor(positions),
        slots=tensor(np.concatenate(slots)),
        tree=tree,
    )


def _depths_and_masks(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Depth of each tree row, and its ancestors with itself as bits of a Python integer."""
    depths, masks = [0], [1]
    for row in range(1, len(parents)):
        parent = parents[row]
        depths.append(depths[parent] + 1)
        masks.append(masks[parent] | 1 << row)
    return depths, masks
