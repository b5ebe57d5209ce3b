"""Rows of slots in a paged cache; pages hold four rows."""

import numpy as np

from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import places_in, starts_of


def test_rows_lie_where_their_pages_are() -> None:
    tables = PageTables(num_slots=3, page_size=4)
    tables.append(0, [7])
    tables.append(2, [5, 1])
    tables.append(2, np.array([6]))
    slots = tables.kv_rows(np.array([0, 2, 2, 2, 2]), np.array([3, 0, 4, 7, 8]))
    assert slots.tolist() == [31, 20, 4, 7, 24]
    assert slots.dtype == np.int64
    assert tables.num_pages.tolist() == [1, 0, 3]


def test_a_cleared_slot_starts_again() -> None:
    tables = PageTables(num_slots=1, page_size=4)
    tables.append(0, [7, 8])
    tables.clear(0)
    tables.append(0, [3])
    assert tables.num_pages.tolist() == [1]
    assert tables.kv_rows(np.array([0]), np.array([2])).tolist() == [14]


def test_a_table_grows_and_keeps_all_pages() -> None:
    tables = PageTables(num_slots=2, page_size=4)
    for page in range(1000):
        tables.append(1, [page])
    tables.append(0, range(2000))
    assert tables.page_table[1, :1000].tolist() == list(range(1000))
    assert tables.page_table[0, :2000].tolist() == list(range(2000))


def test_segments_without_elements_take_no_place() -> None:
    counts = np.array([2, 0, 3])
    assert starts_of(counts).tolist() == [0, 2, 2]
    assert places_in(counts).tolist() == [0, 1, 0, 1, 2]
    assert places_in(np.zeros(0, dtype=np.int64)).tolist() == []
