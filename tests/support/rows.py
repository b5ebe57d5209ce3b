"""Rows of a forward, sequence by sequence, as tests write them down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from outrider.workers.model.batch import (
    ForwardBatch,
    TreeRows,
    ancestor_masks,
    build_batch,
    depths_of,
    num_mask_words,
)
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import places_in, starts_of


@dataclass(frozen=True)
class SequenceRows:
    """One sequence's share of a forward.

    Attributes:
        pages: page ids, enough for context_len + len(parents) rows.
        context_len: committed rows in the cache.
        parents: for each tree row, already cached or new, the row of its parent; the root is row 0 and its own
            parent. A prompt chunk is the chain [0, 0, 1, 2, ...].
        num_cached: how many of the first tree rows are in the cache already.
        tokens: token ids of the other rows, the queries: len(parents) - num_cached of them.
    """

    pages: Sequence[int]
    context_len: int
    parents: Sequence[int]
    num_cached: int
    tokens: Sequence[int]


def chain(num_rows: int) -> list[int]:
    """Parents of a chain of rows: [0, 0, 1, 2, ...]."""
    return [0, *range(num_rows - 1)]


def batch_of(sequences: Sequence[SequenceRows], page_size: int, device: torch.device) -> ForwardBatch:
    """The sequences' queries, in slots 0, 1, 2, …"""
    tables = PageTables(len(sequences), page_size)
    for slot, rows in enumerate(sequences):
        tables.append(slot, rows.pages)
        assert len(rows.parents) == rows.num_cached + len(rows.tokens)
    tree_lens = np.array([len(rows.parents) for rows in sequences])
    query_lens = np.array([len(rows.tokens) for rows in sequences])
    places = places_in(tree_lens)
    parents = np.concatenate([rows.parents for rows in sequences])
    masks = ancestor_masks(
        parents + np.repeat(starts_of(tree_lens), tree_lens), places, num_mask_words(tree_lens)
    )
    new = places >= np.repeat(tree_lens - query_lens, tree_lens)
    rows_of_all = TreeRows(
        slots=np.arange(len(sequences)),
        context_lens=np.array([rows.context_len for rows in sequences]),
        tree_lens=tree_lens,
        query_lens=query_lens,
        tokens=np.concatenate([np.asarray(rows.tokens, dtype=np.int64) for rows in sequences]),
        tree_rows=places[new],
        depths=depths_of(masks)[new],
        ancestors=masks[new],
    )
    return build_batch(tables, rows_of_all, device)
