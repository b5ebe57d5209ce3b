"""From the rows of many trees to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.kernels.transfers import upload
from outrider.kernels.tree_batch import MASK_WORD_BITS, TreeBatch
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import Int64Array

UInt64Array = npt.NDArray[np.uint64]


class TreeRows(NamedTuple):
    """The rows that one forward computes: N of them, those of B sequences back to back.

    Tree row j of a sequence is the j-th behind its committed rows, whatever its depth. The queries are the LAST
    `query_lens` of its `tree_lens` rows.

    Attributes:
        slots: int64 [B], the sequences.
        context_lens: int64 [B], committed rows in the cache.
        tree_lens: int64 [B], rows behind them once this is computed, those included that are cached already.
        query_lens: int64 [B].
        tokens: int64 [N].
        tree_rows: int64 [N], the tree row of each query.
        depths: int64 [N]; the root has depth 0.
        ancestors: uint64 [N, W]; bit k of word w: tree row 64 * w + k is an ancestor of the query, or is the query.
    """

    slots: Int64Array
    context_lens: Int64Array
    tree_lens: Int64Array
    query_lens: Int64Array
    tokens: Int64Array
    tree_rows: Int64Array
    depths: Int64Array
    ancestors: UInt64Array


class ForwardBatch(NamedTuple):
    """The rows of one forward, sequences back to back.

    Attributes:
        tokens, positions, kv_rows: int64 [N]; kv_row = page * page_size + offset, where the row's KV is written.
        tree: what attention knows.
    """

    tokens: Tensor
    positions: Tensor
    kv_rows: Tensor
    tree: TreeBatch

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them; the page table, which may be the largest, comes last."""
        tree = self.tree
        lens = (tree.context_lens, tree.tree_lens, tree.query_indptr)
        return (
            self.tokens, self.positions, self.kv_rows, tree.ancestors, tree.depths, *lens, tree.page_table
        )  # fmt: skip

    def with_tensors(self, tensors: Sequence[Tensor]) -> ForwardBatch:
        """With others in their places."""
        tokens, positions, kv_rows, ancestors, depths, context_lens, tree_lens, query_indptr, pages = tensors
        tree = replace(
            self.tree,
            ancestors=ancestors,
            depths=depths,
            context_lens=context_lens,
            tree_lens=tree_lens,
            query_indptr=query_indptr,
            page_table=pages,
        )
        return ForwardBatch(tokens, positions, kv_rows, tree)

    def to(self, device: torch.device) -> ForwardBatch:
        """A batch of the host on a device, in one copy; itself where that is the host."""
        return self.along_with((), device)[0]

    def along_with(self, others: Sequence[Tensor], device: torch.device) -> tuple[ForwardBatch, list[Tensor]]:
        """`to`, and other tensors of the host in the same copy."""
        if device.type == "cpu":
            return self, list(others)
        tensors = self.tensors()
        there = upload([*tensors, *others], device)
        return self.with_tensors(there[: len(tensors)]), there[len(tensors) :]


def num_mask_words(tree_lens: Int64Array) -> int:
    """Words of an ancestor mask for the longest of these trees."""
    return max(1, -(-max(tree_lens.tolist(), default=0) // MASK_WORD_BITS))


def ancestor_masks(parents: Int64Array, bits: Int64Array, num_words: int) -> UInt64Array:
    """Of every row the rows on its path to the root, itself included: uint64 [N, num_words].

    By pointer doubling: a row's mask takes in that of its 1st, 2nd, 4th, … ancestor, each of which tells of as many
    rows, so a chain of n rows takes log2(n) passes, a tree those of its depth.

    Args:
        parents: int64 [N], the index of each row's parent among these N; a root is its own parent.
        bits: int64 [N], the bit that stands for each row.
    """
    masks = np.zeros((len(parents), num_words), dtype=np.uint64)
    masks[np.arange(len(parents)), bits // MASK_WORD_BITS] = np.uint64(1) << (bits % MASK_WORD_BITS).astype(
        np.uint64
    )
    reached = parents
    while True:
        masks |= masks.take(reached, axis=0)
        further = reached[reached]
        if not np.count_nonzero(further != reached):
            return masks
        reached = further


def depths_of(masks: UInt64Array) -> Int64Array:
    """Depth of every row, int64 [N], from its ancestor mask, uint64 [N, W]."""
    return np.add.reduce(np.bitwise_count(masks), axis=1, dtype=np.int64) - 1


def build_batch(tables: PageTables, rows: TreeRows, device: torch.device) -> ForwardBatch:
    """`lay_out` on a device."""
    return lay_out(tables, rows).to(device)


def lay_out(tables: PageTables, rows: TreeRows) -> ForwardBatch:
    """The queries of all sequences for one forward, on the host; the tables hold pages for all their rows."""
    contexts_of_rows = rows.context_lens.repeat(rows.query_lens)
    num_pages = tables.num_pages[rows.slots]
    assert not np.count_nonzero(num_pages * tables.page_size < rows.context_lens + rows.tree_lens), (
        "too few pages"
    )
    kv_rows = tables.kv_rows(rows.slots.repeat(rows.query_lens), contexts_of_rows + rows.tree_rows)
    query_indptr = np.zeros(len(rows.slots) + 1, dtype=np.int32)
    rows.query_lens.cumsum(out=query_indptr[1:])
    tensor = torch.from_numpy
    tree = TreeBatch(
        page_table=tensor(tables.page_table[rows.slots, : max(num_pages.tolist(), default=0)]),
        context_lens=tensor(rows.context_lens.astype(np.int32)),
        tree_lens=tensor(rows.tree_lens.astype(np.int32)),
        query_indptr=tensor(query_indptr),
        ancestors=tensor(rows.ancestors.view(np.int64)),
        depths=tensor(rows.depths.astype(np.int32)),
        page_size=tables.page_size,
        host_context_lens=tuple(rows.context_lens.tolist()),
        host_tree_lens=tuple(rows.tree_lens.tolist()),
        host_query_lens=tuple(rows.query_lens.tolist()),
    )
    return ForwardBatch(
        tokens=tensor(rows.tokens),
        positions=tensor(contexts_of_rows + rows.depths),
        kv_rows=tensor(kv_rows),
        tree=tree,
    )
