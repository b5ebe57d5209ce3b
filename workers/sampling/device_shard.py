"""One rank's logits where a GPU left them. Answers come to the host, never whole rows; what was foreseen comes all at
once, by one launch of `sample_shard`, the rest when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.noise import Float32Array, Int64Array, UInt32Array
from outrider.kernels.sample_shard import Answers, AskedRows, Records, sample_shard
from outrider.kernels.selection import KernelSelection
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import (
    LOWEST,
    UInt64Array,
    best_of,
    drop_surplus,
    ids_of,
    pack_tokens,
    removed_by_id,
    unpack_tokens,
    with_ids,
)
from outrider.kernels.transfers import upload
from outrider.workers.sampling.law import Edits, PlannedEdits

NOTHING_FORESEEN = AskedRows.nothing(0)


class DeviceShard:
    """A `Shard` that stays on its device.

    `logits` [num_rows, shard_size] must not change while this is in use. It edits them in place as soon as something
    is asked for that was not foreseen, until `undo`.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        shard_ids: ShardIds,
        kernels: KernelSelection,
        foreseen: AskedRows = NOTHING_FORESEEN,
        there: Sequence[torch.Tensor] = (),
        seen: Answers | None = None,
    ) -> None:
        """
        Args:
            kernels: has `sample_shard`.
            foreseen: of all rows in their order, or of none. With the edits that the law asks for; top-k, top-p and
                min-p only where this is the whole vocabulary.
            there: what is foreseen, if it has been copied already, see `sample_shard`.
            seen: the answers to it, if they are there already.
        """
        assert kernels.sample_shard
        self._logits = logits
        self._ids = shard_ids
        self._kernels = kernels
        self._foreseen = foreseen
        self._there = there
        self._edits: Edits | None = None
        # What is known of each row without a further look.
        self._has_maximum = np.ones(len(foreseen.rows), dtype=np.bool_)
        if seen is not None:
            self._seen = seen

    @cached_property
    def _seen(self) -> Answers:
        return sample_shard(self._logits, self._foreseen, self._ids, use_kernel=True, there=self._there)

    @cached_property
    def _winners(self) -> tuple[UInt64Array, Int64Array]:
        """Packed tokens [num_rows, num_best] of those that were foreseen, and their ids, -1 where none were."""
        packed, ids = self._packed(self._seen.winners)
        return packed, np.where(self._seen.winners["column"] < 0, -1, ids)

    def as_it_came(self) -> DeviceShard:
        """Before the edits. Call `undo` first."""
        assert self._edits is None
        asked, seen = self._foreseen, self._seen
        rows, sums, winners = asked.rows.copy(), seen.sums.copy(), seen.winners.copy()
        rows["temperature"], rows["first_edit"], rows["end_edit"] = 1.0, 0, 0
        rows["wants_sum"], rows["likeliest"] = rows["wants_raw"], rows["raw_likeliest"]
        sums["sum"], sums["maximum"] = sums["raw_sum"], sums["raw_maximum"]
        winners["logit"] = winners["raw_logit"]
        foreseen = replace(asked, rows=rows, edits=asked.edits[:0], list_size=asked.raw_list_size)
        answers = Answers(sums, winners, seen.raw_lists, seen.raw_lists)
        shard = DeviceShard(self._logits, self._ids, self._kernels, foreseen, seen=answers)
        shard._has_maximum = rows["wants_raw"] > 0
        return shard

    def undo(self) -> None:
        """Make the logits the model's own again."""
        if self._edits is not None:
            self._edits.undo(self._logits)
            self._edits = None

    def logits(self, rows: Int64Array, ids: Int64Array) -> Float32Array:
        found, is_known = self._seen_logits(rows, ids)
        if is_known:
            return found
        indices = (torch.from_numpy(rows), torch.from_numpy(self._ids.columns(ids)))
        rows_there, columns = upload(indices, self._logits.device)
        return self._edited()[rows_there, columns].cpu().numpy()

    def _seen_logits(self, rows: Int64Array, ids: Int64Array) -> tuple[Float32Array, bool]:
        """`logits` of tokens that were seen, and whether all were."""
        found = np.full(len(rows), np.nan, dtype=np.float32)
        if len(self._foreseen.rows) and self._foreseen.num_best:
            is_it = self._winners[1][rows] == ids[:, None]
            here = is_it.any(axis=1).nonzero()[0]
            found[here] = self._seen.winners["logit"][rows[here], is_it[here].argmax(axis=1)]
        if self._foreseen.num_lists:
            lists = self._foreseen.rows["likeliest"][rows]
            values, tokens = unpack_tokens(self._seen.lists[np.maximum(lists, 0)])
            is_it = (tokens == ids[:, None]) & (lists >= 0)[:, None]
            here = is_it.any(axis=1).nonzero()[0]
            found[here] = values[here, is_it[here].argmax(axis=1)]
        return found, not np.count_nonzero(np.isnan(found))

    def maxima(self, rows: Int64Array) -> Float32Array:
        if len(self._has_maximum) and self._has_maximum[rows].all():
            return np.ascontiguousarray(self._seen.sums["maximum"])[rows]
        return self._rows(rows).amax(dim=1).cpu().numpy()

    def exp_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        if len(self._foreseen.rows):
            asked = self._foreseen.rows[rows]
            own = asked["temperature"] + (asked["temperature"] == 0.0)
            if asked["wants_sum"].all() and np.array_equal(own, temperatures):
                seen = self._seen.sums[rows]
                largest = np.maximum(seen["maximum"], LOWEST).astype(np.float64)
                sums: npt.NDArray[np.float64] = seen["sum"] * np.exp((largest - maxima) / temperatures)
                return sums
        settings = (torch.from_numpy(maxima), torch.from_numpy(np.float32(1.0) / temperatures))
        largest_there, factors = upload(settings, self._logits.device)
        x = (self._rows(rows) - largest_there[:, None]) * factors[:, None]
        return x.exp_().sum(dim=1, dtype=torch.float64).cpu().numpy()

    def weighted_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        x = self._rows(rows) - self._tensor(maxima)[:, None]
        x = (x * self._tensor(np.float32(1.0) / temperatures)[:, None]).clamp_min(float(LOWEST))
        return (x * x.exp()).sum(dim=1, dtype=torch.float64).cpu().numpy()

    def largest(self, rows: Int64Array, count: int) -> Float32Array:
        if self._has_lists(rows, count):
            values, _ = unpack_tokens(self.top(rows, count))
            return np.ascontiguousarray(values)
        part = self._rows(rows)
        return part.topk(min(count, part.shape[1]), dim=1).values.cpu().numpy()

    def top(self, rows: Int64Array, count: int) -> UInt64Array:
        if self._has_lists(rows, count):
            return self._seen.lists[self._foreseen.rows["likeliest"][rows]][:, :count]
        part = self._rows(rows)
        # `pack_tokens` upside down, so that it fits into a signed integer, of columns: no two are equal.
        bits = (part + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**32
        rising += 0xFFFFFFFF - torch.arange(part.shape[1], device=part.device)
        largest = rising.topk(min(count, part.shape[1]), dim=1).values.cpu().numpy()
        packed = np.uint64(2**63 - 1) - largest.view(np.uint64)
        return with_ids(packed, self._ids.of(ids_of(packed)))

    def _has_lists(self, rows: Int64Array, count: int) -> bool:
        """Whether so many of the likeliest tokens were foreseen."""
        is_long = min(count, self._logits.shape[1]) <= self._foreseen.list_size
        return is_long and bool((self._foreseen.rows["likeliest"][rows] >= 0).all())

    def best(
        self, rows: Int64Array, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        if count == self._foreseen.num_best and self._foreseen.rows["num_best"][rows].all():
            return self._ranked(rows)
        return self._best_of(self._edited(), rows, temperatures, keys, count)

    def best_foreseen(self, rows: Int64Array) -> tuple[UInt64Array, npt.NDArray[np.float64]]:
        """Of rows whose whole law was foreseen: [n, num_best] packed tokens, and [n] the masses of what is kept."""
        assert self._foreseen.rows["num_best"][rows].all()
        return self._ranked(rows), self._seen.sums["kept_sum"][rows]

    def best_kept(
        self,
        rows: Int64Array,
        lowest: Float32Array,
        num_lowest: Int64Array,
        temperatures: Float32Array,
        keys: UInt32Array,
        count: int,
    ) -> UInt64Array:
        best = np.empty((len(rows), count), dtype=np.uint64)
        here, rest = np.zeros(0, dtype=np.int64), np.arange(len(rows))
        if self._has_lists(rows, self._foreseen.list_size) and self._foreseen.list_size:
            values, ids = unpack_tokens(self.top(rows, self._foreseen.list_size))
            # All that is kept is among the likeliest, if these go below it or there are no others.
            ends = (values[:, -1] < lowest) | (values.shape[1] == self._logits.shape[1])
            here, rest = ends.nonzero()[0], (~ends).nonzero()[0]
        if len(here):
            kept = np.where(values[here] < lowest[here, None], np.float32(-np.inf), values[here])
            drop_surplus(kept, lowest[here], num_lowest[here])
            best[here] = best_of(kept, ids[here], temperatures[here], keys[here], count, self._ids.all)
        if len(rest):
            part, edge, nums = self._rows(rows[rest]), *self._edges(lowest[rest], num_lowest[rest])
            equal = part == edge
            late = equal & (equal.cumsum(dim=1, dtype=torch.int32) > nums)
            kept_there = part.masked_fill((part < edge) | late, -torch.inf)
            best[rest] = self._best_of(
                kept_there, np.arange(len(rest)), temperatures[rest], keys[rest], count
            )
        return best

    def _edges(self, lowest: Float32Array, num_lowest: Int64Array) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, 1] each, on the device."""
        on_host = (torch.from_numpy(lowest), torch.from_numpy(num_lowest))
        edges, nums = upload(on_host, self._logits.device)
        return edges[:, None], nums[:, None]

    def _best_of(
        self,
        logits: torch.Tensor,
        rows: Int64Array,
        temperatures: Float32Array,
        keys: UInt32Array,
        count: int,
    ) -> UInt64Array:
        asked = AskedRows.best(temperatures, keys, count)
        asked.rows["source"] = rows
        packed, _ = self._packed(sample_shard(logits, asked, self._ids, use_kernel=True).winners)
        return removed_by_id(packed, self._ids.all)

    def _ranked(self, rows: Int64Array) -> UInt64Array:
        return removed_by_id(self._winners[0][rows], self._ids.all)

    def _packed(self, winners: Records) -> tuple[UInt64Array, Int64Array]:
        """Packed tokens, and their ids; of one that was not wanted the first id."""
        ids = self._ids.of(np.maximum(winners["column"], 0).astype(np.int64))
        return pack_tokens(np.ascontiguousarray(winners["score"]), ids), ids

    def _edited(self) -> torch.Tensor:
        if self._edits is None:
            asked = self._foreseen.rows
            rows = np.arange(len(asked)).repeat(asked["end_edit"] - asked["first_edit"])
            self._edits = PlannedEdits(rows, self._foreseen.edits).make(self._logits)
        return self._logits

    def _rows(self, rows: Int64Array) -> torch.Tensor:
        logits = self._edited()
        if np.array_equal(rows, np.arange(len(logits))):
            return logits
        return gather_rows(logits, self._tensor(rows), self._kernels.gather_rows)

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        (there,) = upload((torch.from_numpy(np.ascontiguousarray(values)),), self._logits.device)
        return there
