"""Which cache rows belong to which slot: the page tables of all running sequences as one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from outrider.workers.sequences.segments import Int64Array

_FIRST_MAX_PAGES = 16


class PageTables:
    """Pages of the sequences in `num_slots` slots, in the order of their rows.

    Attributes:
        page_table: int32 [num_slots, max_pages]; entries from num_pages[slot] on mean nothing.
        num_pages: int64 [num_slots].
        page_size: rows in a page.
    """

    def __init__(self, num_slots: int, page_size: int) -> None:
        self.page_size = page_size
        self.page_table: npt.NDArray[np.int32] = np.zeros((num_slots, _FIRST_MAX_PAGES), dtype=np.int32)
        self.num_pages: Int64Array = np.zeros(num_slots, dtype=np.int64)

    def append(self, slot: int, pages: Sequence[int] | Int64Array) -> None:
        """The next rows of a slot are in these pages."""
        first = int(self.num_pages[slot])
        end = first + len(pages)
        if end > self.page_table.shape[1]:
            wider = np.zeros((len(self.num_pages), 2 * end), dtype=np.int32)
            wider[:, : self.page_table.shape[1]] = self.page_table
            self.page_table = wider
        self.page_table[slot, first:end] = pages
        self.num_pages[slot] = end

    def clear(self, slot: int) -> None:
        """The slot has no pages any more."""
        self.num_pages[slot] = 0

    def kv_rows(self, slots: Int64Array, rows: Int64Array) -> Int64Array:
        """Where rows lie in the cache: page * page_size + offset.

        Args:
            slots: int64 [N], whose row it is.
            rows: int64 [N], the row within its sequence; its page must be there.
        """
        indices = rows // self.page_size
        pages = self.page_table.reshape(-1)[slots * self.page_table.shape[1] + indices]
        # A row is page_size * index + offset.
        return rows + (pages - indices) * self.page_size
