"""A target's round as one graph: cache rows of accepted paths move, forward and head run, rows are sampled where laws
ask what they mostly do. The host launches nothing besides, and all of it counts as the forward's time.

Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from outrider.kernels import sample_shard as sampling
from outrider.kernels.sample_shard import ROW, Answers, AskedRows, answer_parts, answers_in
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.transfers import Part, num_bytes_of
from outrider.workers.model.cache import PagedCache
from outrider.workers.sequences.segments import Int64Array

_NOT_MOVED = -1
_NOT_ASKED = 255  # in every byte: the row of the logits is negative
_NO_MOVES = torch.empty(0, dtype=torch.int64)
_FEWEST_MOVES = 64
"""That a graph has room for: the paths of the round before may have had more rows than this one."""


class Around(NamedTuple):
    """What a round does around its forward.

    Attributes:
        sources, targets: int64 [M] each, cache rows that move first, see `kv_commit`.
        sampled: int64 [n], rows of the batch whose logits are looked at.
        asked: of these in their order, what is asked; None: nothing.
    """

    sources: Tensor
    targets: Tensor
    sampled: Int64Array
    asked: AskedRows | None

    def on_host(self) -> list[Tensor]:
        """Moves and records, for whoever does this on its own."""
        return [self.sources, self.targets, *(self.asked.on_host() if self.asked else ())]


class Written(NamedTuple):
    """What sampling in a graph leaves on the device.

    Attributes:
        buffer: uint8, of `num_rows` records.
        ids: of the logits' columns.
    """

    buffer: Tensor
    num_rows: int
    ids: ShardIds

    def answers(self, asked: AskedRows) -> Answers:
        """To what the replay was asked; waits for it."""
        # Lists stand last: of those that nobody asked for nothing is copied.
        num_bytes = num_bytes_of(answer_parts(self.num_rows, *asked.counts[1:]))
        return answers_in(self.buffer[:num_bytes].cpu(), asked, self.ids, self.num_rows)


class WholeRounds:
    """What graphs of rounds have around their forwards."""

    def __init__(self, cache: PagedCache, ids: ShardIds, list_size: int) -> None:
        """
        Args:
            cache: with a kernel that moves its rows.
            ids: of the logits' columns.
            list_size: the likeliest tokens of a row, where they are asked for at all; 0: they never are.
        """
        self._cache, self._ids, self._list_size = cache, ids, list_size
        self._table = ids.table_on(cache.kv.device)
        self._no_edits = torch.empty(0, dtype=torch.uint8, device=cache.kv.device)

    def takes(self, around: Around, num_rows: int) -> bool:
        """Whether graphs of so many rows do this: they answer with the best token, sums, and as many of the likeliest
        tokens as are mostly asked for."""
        if len(around.sources) > _num_moves(num_rows):
            return False
        asked = around.asked
        return asked is None or (
            asked.num_best == 1
            and asked.list_size in (0, self._list_size)
            and not len(asked.edits)
            and not asked.num_raw_lists
        )

    def given(self, around: Around | None) -> Sequence[Tensor]:
        """The first of the extras; None: nothing is around the forward."""
        moves, rows = (_NO_MOVES, _NO_MOVES), AskedRows.nothing(0).rows
        if around is not None:
            moves = (around.sources, around.targets)
            if around.asked is not None:
                rows = around.asked.rows.copy()
                rows["source"] = around.sampled
        return *moves, torch.from_numpy(rows.view(np.uint8)).view(len(rows), ROW.itemsize)

    def before(self, extras: Sequence[Tensor]) -> None:
        """Recorded before a forward."""
        self._cache.commit(*extras[:2])

    def behind(self, logits: Tensor, extras: Sequence[Tensor]) -> Written:
        """Recorded behind a forward whose logits are float32 [num_rows, vocab_shard]."""
        asked, num_rows = extras[2], len(logits)
        counts = list(_counts(num_rows, self._list_size))
        first_id = self._ids.first
        answers = sampling.sample_shard_op(logits, asked, self._no_edits, self._table, first_id, counts)
        return Written(answers, num_rows, self._ids)


def extras_of(num_rows: int) -> Sequence[tuple[Part, int]]:
    """Of a `StaticBatch` of so many rows: what `WholeRounds.given` fills."""
    moves = (Part((_num_moves(num_rows),), torch.int64), _NOT_MOVED)
    return moves, moves, (Part((num_rows, ROW.itemsize), torch.uint8), _NOT_ASKED)


def answer_bytes(num_rows: int, list_size: int) -> int:
    """Of what a graph of so many rows writes besides logits; `list_size` as in `WholeRounds`."""
    return num_bytes_of(answer_parts(*_counts(num_rows, list_size)))


def _counts(num_rows: int, list_size: int) -> tuple[int, int, int, int, int, int]:
    return num_rows, 1, num_rows if list_size else 0, list_size, 0, 0


def _num_moves(num_rows: int) -> int:
    return max(num_rows, _FEWEST_MOVES)
