"""Batches for the check: trees of one shape behind contexts of one length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.workers.model.batch import TreeRows, ancestor_masks, depths_of, num_mask_words
from outrider.workers.sequences.page_tables import PageTables

PAGE_SIZE = 16


def chain(num_rows: int) -> list[int]:
    """Parents of a chain of rows: [0, 0, 1, 2, ...]."""
    return [0, *range(num_rows - 1)]


def trees_of(
    pages: Sequence[Sequence[int]], context_len: int, parents: Sequence[int], tokens: Sequence[int]
) -> tuple[PageTables, TreeRows]:
    """The same rows for every sequence, as `build_batch` takes them.

    Args:
        pages: of each sequence, enough for its context and the rows.
        context_len: rows in the cache.
        parents, tokens: of the rows behind them; the first is its own parent.
    """
    num_sequences, num_rows = len(pages), len(parents)
    tables = PageTables(num_sequences, PAGE_SIZE)
    for slot, each in enumerate(pages):
        tables.append(slot, each)
    lens = np.full(num_sequences, num_rows)
    places = np.tile(np.arange(num_rows), num_sequences)
    starts = np.repeat(np.arange(num_sequences) * num_rows, num_rows)
    masks = ancestor_masks(np.tile(parents, num_sequences) + starts, places, num_mask_words(lens))
    rows = TreeRows(
        slots=np.arange(num_sequences),
        context_lens=np.full(num_sequences, context_len),
        tree_lens=lens,
        query_lens=lens,
        tokens=np.tile(tokens, num_sequences),
        tree_rows=places,
        depths=depths_of(masks),
        ancestors=masks,
    )
    return tables, rows
