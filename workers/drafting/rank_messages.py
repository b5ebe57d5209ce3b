"""What rank 0 of the drafter says to its other ranks: one flat int32 message before each forward and each commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.workers.model.batch import TreeRows
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import Int64Array

Int32Array = npt.NDArray[np.int32]
Pages: TypeAlias = "tuple[tuple[int, int, Int64Array], ...]"
"""Of slots: how many of their first pages stay, and those that follow them."""

_FORWARD, _COMMIT, _STOP = 1, 2, 3


class PageNews:
    """What the others do not know yet of the page tables of rank 0."""

    def __init__(self, num_slots: int, page_size: int) -> None:
        self._known = PageTables(num_slots, page_size)

    def since(self, tables: PageTables, slots: Int64Array) -> Pages:
        """Of these slots, since the last call; from now on the others know it."""
        known, news = self._known, []
        for slot, count in zip(slots.tolist(), tables.num_pages[slots].tolist(), strict=True):
            pages, num_known = tables.page_table[slot, :count], int(known.num_pages[slot])
            both = min(count, num_known)
            differs = (pages[:both] != known.page_table[slot, :both]).nonzero()[0]
            first = int(differs[0]) if len(differs) else both
            if first < count or count != num_known:
                changed = pages[first:].astype(np.int64)
                known.num_pages[slot] = first
                known.append(slot, changed)
                news.append((slot, first, changed))
        return tuple(news)


@dataclass(frozen=True, eq=False)
class RankForward:
    """A forward over `rows`; then, unless it is empty, the logits of the rows `wanted` (int64 [M]) of it."""

    rows: TreeRows
    wanted: Int64Array
    pages: Pages

    def encoded(self) -> Tensor:
        rows = self.rows
        sizes = [len(rows.slots), len(rows.tokens), rows.ancestors.shape[1], len(self.wanted)]
        pages = [np.array([slot, first, len(after)]) for slot, first, after in self.pages]
        return _message(
            _FORWARD,
            [*sizes, len(pages)],
            rows.slots,
            rows.context_lens,
            rows.tree_lens,
            rows.query_lens,
            rows.tokens,
            rows.tree_rows,
            rows.depths,
            rows.ancestors.reshape(-1).view(np.int32),
            self.wanted,
            *pages,
            *(after for _, _, after in self.pages),
        )


@dataclass(frozen=True, eq=False)
class RankCommit:
    """Cache rows (int64 [M] each) move."""

    sources: Int64Array
    targets: Int64Array

    def encoded(self) -> Tensor:
        return _message(_COMMIT, [len(self.sources)], self.sources, self.targets)


@dataclass(frozen=True)
class RankStop:
    """Nothing follows."""

    def encoded(self) -> Tensor:
        return _message(_STOP, [])


def decode(message: Int32Array) -> RankForward | RankCommit | RankStop:
    """The inverse of `encoded`."""
    kind, reader = int(message[0]), _Reader(message[1:])
    if kind == _STOP:
        return RankStop()
    if kind == _COMMIT:
        (size,) = reader.ints(1).tolist()
        return RankCommit(reader.ints(size), reader.ints(size))
    assert kind == _FORWARD, kind
    num_slots, num_rows, num_words, num_wanted, num_news = reader.ints(5).tolist()
    slots, contexts, tree_lens, query_lens = (reader.ints(num_slots) for _ in range(4))
    tokens, tree_rows, depths = (reader.ints(num_rows) for _ in range(3))
    ancestors = reader.words(2 * num_rows * num_words).view(np.uint64).reshape(num_rows, num_words)
    rows = TreeRows(slots, contexts, tree_lens, query_lens, tokens, tree_rows, depths, ancestors)
    wanted = reader.ints(num_wanted)
    news = [reader.ints(3).tolist() for _ in range(num_news)]
    pages = tuple((slot, first, reader.ints(count)) for slot, first, count in news)
    return RankForward(rows, wanted, pages)


class _Reader:
    def __init__(self, message: Int32Array) -> None:
        self._rest = message

    def words(self, count: int) -> Int32Array:
        """The next ones, a copy."""
        words, self._rest = self._rest[:count].copy(), self._rest[count:]
        assert len(words) == count, "a message is too short"
        return words

    def ints(self, count: int) -> Int64Array:
        return self.words(count).astype(np.int64)


def _message(kind: int, sizes: Sequence[int], *parts: npt.NDArray[np.int64] | Int32Array) -> Tensor:
    return torch.from_numpy(
        np.concatenate(
            [np.array([kind, *sizes], dtype=np.int32), *(part.astype(np.int32, copy=False) for part in parts)]
        )
    )
