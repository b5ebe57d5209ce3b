"""What sampling wants to know of rows of a rank's shard of the vocabulary, by one launch: the best tokens by
logit / temperature + Gumbel(key, id) among those that top-k, top-p and min-p keep, ties to the smaller id, under
penalties and bias; the likeliest tokens; sums of exponentials.

The reference is plain: it sorts whole rows. `ShardLogits` is the CPU path of a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.launch_plans import LaunchPlan, launch
from outrider.kernels.noise import Float32Array, Int64Array, UInt32Array, gumbel_from_hash, hash_rows
from outrider.kernels.shapes import check_kernel_arguments, check_shapes
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import (
    LOWEST,
    UInt64Array,
    exponentials,
    pack_tokens,
    unpack_tokens,
    with_ids,
)
from outrider.kernels.transfers import Part, num_bytes_of, upload, views_of

Records = npt.NDArray[np.void]

ROW = np.dtype(
    [
        ("top_p", "f8"),  # 1: no limit
        ("log_min_p", "f8"),  # -inf: no limit
        ("temperature", "f4"),  # 0: no noise, and sums as of 1
        ("key", "u4", 2),  # `noise_key` of seed and position
        ("source", "i4"),  # the row of the logits; negative: nothing is asked
        ("top_k", "i4"),  # 0: no limit
        ("num_best", "i4"),
        ("first_edit", "i4"),
        ("end_edit", "i4"),
        ("likeliest", "i4"),  # which list gets its likeliest tokens; negative: they are not asked for
        ("raw_likeliest", "i4"),  # those before the edits
        ("wants_sum", "i4"),
        ("wants_raw", "i4"),
    ]
)
EDIT = np.dtype(
    [("column", "i4"), ("bias", "f4"), ("repetition", "f4"), ("presence", "f4"), ("frequency", "f4")]
)
"""Of a logit: `bias` is added; it is divided (if negative, multiplied) by `repetition`; then the others are taken."""
SUMS = np.dtype(
    [("sum", "f8"), ("kept_sum", "f8"), ("raw_sum", "f8"), ("maximum", "f4"), ("raw_maximum", "f4")]
)
WINNER = np.dtype([("score", "f4"), ("logit", "f4"), ("raw_logit", "f4"), ("column", "i4")])
MAX_LOGIT = 1e36
"""A row whose largest logit, edited, is not within ±MAX_LOGIT is no law: divided by the lowest temperature it would
leave float32."""
_THREADS = 512
_SHARED_BYTES = 16 * 8 * 8 + 4 * _THREADS  # of sums and counts; lists come behind them
MAX_LIST = 2048
"""The most likeliest tokens of a row."""


@dataclass(frozen=True)
class AskedRows:
    """What is asked of rows, from the first on; `edits` of a row stand together and have distinct columns."""

    rows: Records  # ROW [num_rows]
    edits: Records  # EDIT [num_edits]
    num_best: int  # the most that any row asks for
    list_size: int  # of the likeliest tokens, at most the size of the shard
    raw_list_size: int

    @staticmethod
    def nothing(num_rows: int) -> AskedRows:
        """Of each row its maximum alone."""
        rows = np.zeros(num_rows, dtype=ROW)
        rows["top_p"], rows["log_min_p"], rows["temperature"] = 1.0, -np.inf, 1.0
        rows["likeliest"] = rows["raw_likeliest"] = -1
        rows["source"] = np.arange(num_rows)
        return AskedRows(rows, np.zeros(0, dtype=EDIT), 0, 0, 0)

    @staticmethod
    def best(temperatures: Float32Array, keys: UInt32Array, count: int) -> AskedRows:
        """The best tokens of each row, and its sum."""
        rows = AskedRows.nothing(len(temperatures)).rows
        rows["temperature"], rows["key"], rows["num_best"], rows["wants_sum"] = temperatures, keys, count, 1
        return AskedRows(rows, np.zeros(0, dtype=EDIT), count, 0, 0)

    def on_host(self) -> list[Tensor]:
        """`rows` and `edits` as bytes."""
        return [torch.from_numpy(records.view(np.uint8)) for records in (self.rows, self.edits)]

    @property
    def num_lists(self) -> int:
        return int(self.rows["likeliest"].max(initial=-1)) + 1

    @property
    def num_raw_lists(self) -> int:
        return int(self.rows["raw_likeliest"].max(initial=-1)) + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """What `answer_parts` takes."""
        return (
            len(self.rows),
            self.num_best,
            self.num_lists,
            self.list_size,
            self.num_raw_lists,
            self.raw_list_size,
        )


class Answers(NamedTuple):
    """Of a row that asks for less, the rest says nothing."""

    sums: Records
    """SUMS [num_rows]: largest logit, NaN where one is; sums over the shard of exp((logit - largest) / temperature),
    of all tokens, and of those that are kept; the same before the edits, at temperature 1."""
    winners: Records
    """WINNER [num_rows, num_best], best first: logit / temperature + noise (the logit at temperature 0), the logit,
    and as it was before the edits. Where tokens have run out the score is -inf; column -1 where none was wanted."""
    lists: UInt64Array  # [num_lists, list_size] packed tokens in order
    raw_lists: UInt64Array


def sample_shard(
    logits: Tensor,
    asked: AskedRows,
    shard_ids: ShardIds,
    use_kernel: bool = False,
    there: Sequence[Tensor] = (),
) -> Answers:
    """As above, on the host; the logits are as they were.

    Args:
        logits: float32 [*, shard_size]; -inf removes a token.
        shard_ids: the token id of each column.
        use_kernel: run `sample_shard.cu` (logits on a GPU): one copy there, one launch, one copy back.
        there: with the kernel, `asked.on_host()` where the logits are, if that has been copied already.

    Raises:
        ValueError: there are not as many ids as columns, or lists are too long.
    """
    if len(shard_ids) != logits.shape[1]:
        raise ValueError(f"shard_ids has {len(shard_ids)} entries, logits has {logits.shape[1]} columns")
    if max(asked.list_size, asked.raw_list_size) > min(logits.shape[1], MAX_LIST):
        raise ValueError(
            f"lists must have at most {min(logits.shape[1], MAX_LIST)} tokens, got {asked.list_size} "
            f"and {asked.raw_list_size}"
        )
    if use_kernel:
        check_shapes((("logits", logits, ("num_rows", "shard_size")),))
        check_kernel_arguments((("logits", logits, torch.float32),))
    table = shard_ids.table_on(logits.device)
    if use_kernel:
        rows, edits = there or upload(asked.on_host(), logits.device)
        answers = sample_shard_op(logits, rows, edits, table, shard_ids.first, list(asked.counts)).cpu()
    else:
        rows, edits = asked.on_host()
        answers = _plain(logits, rows, edits, table, shard_ids.first, list(asked.counts))
    return answers_in(answers, asked, shard_ids, len(asked.rows))


def answers_in(buffer: Tensor, asked: AskedRows, shard_ids: ShardIds, num_rows: int) -> Answers:
    """What stands in a buffer of the host that was an operator's for `num_rows` records, those asked about first."""
    parts = answer_parts(num_rows, *asked.counts[1:])
    sums, winners, lists, raw_lists = (view.numpy() for view in views_of(buffer, parts))
    num_asked = len(asked.rows)
    won = winners.view(WINNER)[:num_asked, :, 0]
    won["column"][np.arange(asked.num_best) >= asked.rows["num_best"][:, None]] = -1
    packed = (each.view(np.uint64) for each in (lists, raw_lists))
    with_token = (
        with_ids(each, shard_ids.of((each & np.uint64(2**32 - 1)).view(np.int64))) for each in packed
    )
    return Answers(sums.view(SUMS)[:num_asked, 0], won, *with_token)


def answer_parts(
    num_rows: int, num_best: int, num_lists: int, list_size: int, num_raw_lists: int, raw_list_size: int
) -> tuple[Part, ...]:
    """Of the buffer that answers are written to: `Answers`, tokens by columns."""
    return (
        Part((num_rows, SUMS.itemsize), torch.uint8),
        Part((num_rows, num_best, WINNER.itemsize), torch.uint8),
        Part((num_lists, list_size), torch.int64),
        Part((num_raw_lists, raw_list_size), torch.int64),
    )


@np.errstate(invalid="ignore")  # rows with NaN
def _plain(
    logits: Tensor, rows: Tensor, edits: Tensor, table: Tensor, vocab_offset: int, counts: list[int]
) -> Tensor:
    ids = ShardIds(table) if len(table) else ShardIds.from_first(vocab_offset, logits.shape[1])
    answers = torch.zeros(num_bytes_of(answer_parts(*counts)), dtype=torch.uint8)
    sums, winners, lists, raw_lists = (view.numpy() for view in views_of(answers, answer_parts(*counts)))
    all_sums, all_winners = sums.view(SUMS)[:, 0], winners.view(WINNER)[..., 0]
    all_edits = edits.numpy().view(EDIT)
    for i, row in enumerate(rows.numpy().view(ROW)):
        if row["source"] >= 0:
            raw = logits[int(row["source"])].numpy()
            own = all_edits[row["first_edit"] : row["end_edit"]]
            _plain_row(row, raw, own, ids, all_sums[i : i + 1], all_winners[i], lists, raw_lists)
    return answers


def _plain_row(
    row: Any,
    raw: Float32Array,
    edits: Records,
    ids: ShardIds,
    sums: Records,
    winners: Records,
    lists: Int64Array,
    raw_lists: Int64Array,
) -> None:
    """One row [shard_size] by sorting it; into sums [1], winners [num_best] and its lists."""
    one = np.ones(1, dtype=np.float32)
    columns = np.arange(len(raw))
    if row["wants_raw"]:
        sums["raw_maximum"] = raw.max()
        base = np.maximum(raw.max(keepdims=True), LOWEST)
        sums["raw_sum"] = exponentials(raw[None], base, one).sum(dtype=np.float64)
    if row["raw_likeliest"] >= 0:
        size = raw_lists.shape[1]
        raw_lists[row["raw_likeliest"]] = np.sort(pack_tokens(raw, columns))[:size].view(np.int64)
    edited = raw.copy()
    for edit in edits:
        x = raw[edit["column"]] + edit["bias"]
        x = x * edit["repetition"] if x < 0 else x / edit["repetition"]
        edited[edit["column"]] = x - edit["presence"] - edit["frequency"]
    sums["maximum"] = edited.max()
    base = np.maximum(edited.max(keepdims=True), LOWEST)
    divisor = one if row["temperature"] == 0.0 else np.array([row["temperature"]], dtype=np.float32)
    order = np.argsort(pack_tokens(edited, columns))
    falling = edited[order]
    masses = exponentials(falling[None], base, divisor)[0].cumsum(dtype=np.float64)
    sums["sum"] = masses[-1]
    kept = len(raw)
    if row["top_k"]:
        kth = falling[min(row["top_k"], kept) - 1]
        kept = int(np.count_nonzero(falling >= kth))
    limit = row["top_p"] * masses[kept - 1] if row["top_p"] < 1.0 else np.inf
    kept = min(kept, 1 + int(np.count_nonzero(masses[:-1] < limit)))
    x = (falling - base).astype(np.float64) / divisor
    kept = min(kept, int(np.count_nonzero(x >= row["log_min_p"])))
    sums["kept_sum"] = masses[kept - 1]
    if row["likeliest"] >= 0:
        size = lists.shape[1]
        lists[row["likeliest"]] = pack_tokens(falling, order)[:size].view(np.int64)
    scores = np.full(len(raw), -np.inf, dtype=np.float32)
    chosen = order[:kept]
    scores[chosen] = edited[chosen]
    if row["temperature"] != 0.0:
        hashes = hash_rows(row["key"][None], ids.of(chosen)[None])[0]
        scores[chosen] = scores[chosen] / divisor + gumbel_from_hash(hashes)
    won = np.sort(pack_tokens(scores, columns))[: row["num_best"]]
    values, best = unpack_tokens(won)
    few = winners[: len(won)]
    few["score"], few["column"], few["logit"], few["raw_logit"] = values, best, edited[best], raw[best]
    few[values == -np.inf] = (-np.inf, -np.inf, -np.inf, 0)  # tokens have run out


@custom_op("outrider::sample_shard", mutates_args=("logits",), device_types="cpu")
def sample_shard_op(
    logits: Tensor, rows: Tensor, edits: Tensor, table: Tensor, vocab_offset: int, counts: list[int]
) -> Tensor:
    """With records as bytes, ids as `plan_sample_shard` takes them, `AskedRows.counts`; on a CPU the reference. The
    logits are written to, and at the end as before."""
    return _plain(logits, rows, edits, table, vocab_offset, counts)


@sample_shard_op.register_fake
def _empty(
    logits: Tensor, rows: Tensor, edits: Tensor, table: Tensor, vocab_offset: int, counts: list[int]
) -> Tensor:
    return logits.new_empty(num_bytes_of(answer_parts(*counts)), dtype=torch.uint8)


@sample_shard_op.register_kernel("cuda")
def sample_shard_on_gpu(
    logits: Tensor, rows: Tensor, edits: Tensor, table: Tensor, vocab_offset: int, counts: list[int]
) -> Tensor:
    answers = _empty(logits, rows, edits, table, vocab_offset, counts)
    originals = logits.new_empty(edits.numel() // EDIT.itemsize)
    if rows.numel() > 0:
        plan = plan_sample_shard(logits, rows, edits, originals, table, vocab_offset, counts, answers)
        launch(logits.device, [plan])
    return answers


def plan_sample_shard(
    logits: Tensor,
    rows: Tensor,
    edits: Tensor,
    originals: Tensor,
    table: Tensor,
    vocab_offset: int,
    counts: list[int],
    answers: Tensor,
) -> LaunchPlan:
    """A block per row that is asked about.

    Args:
        logits: float32 [*, shard_size], edited and as before at the end.
        rows, edits: uint8, the records ROW and EDIT; originals: workspace float32, one per edit.
        vocab_offset: token id of column 0; table: int64 [shard_size], the token id of each column, ascending, or no
            elements where they are consecutive.
        counts: of `AskedRows`.
        answers: output uint8, in `answer_parts`.
    """
    num_rows, num_best, _, list_size, _, raw_list_size = counts
    sums, winners, lists, raw_lists = views_of(answers, answer_parts(*counts))
    return LaunchPlan(
        source="sample_shard",
        kernel="sample_shard",
        grid=(num_rows, 1, 1),
        block=_THREADS,
        # Compiled, the loop over a list reads two tokens at once, the last one with what lies behind it.
        shared_bytes=_SHARED_BYTES + 16 * -(-max(list_size, raw_list_size) // 2),
        arguments=(
            logits,
            rows,
            edits,
            originals,
            table if len(table) else np.int64(0),
            sums,
            winners,
            lists,
            raw_lists,
            np.int32(logits.shape[1]),
            np.int32(num_best),
            np.int32(list_size),
            np.int32(raw_list_size),
            np.int64(vocab_offset),
            np.int64(logits.stride(0)),
        ),
    )
