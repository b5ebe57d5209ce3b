"""Cases of `sample_shard`: rows that ask for all that it answers, in turn and together."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from outrider.kernels.noise import Float32Array, noise_key
from outrider.kernels.prepared import Check, Guards, PreparedCase
from outrider.kernels.sample_shard import (
    EDIT,
    SUMS,
    WINNER,
    AskedRows,
    Records,
    answer_parts,
    plan_sample_shard,
    sample_shard_op,
)
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.transfers import num_bytes_of, views_of

_UNTOUCHED = -7  # what `Guards` leaves in bytes


def prepare_sample_shard(
    vocab_size: int,
    vocab_offset: int,
    device: torch.device,
    step: int = 1,
    coarse: bool = False,
    seed: int = 4,
) -> PreparedCase:
    """Rows at several temperatures, cut in every way, edited and not, greedy with a tie, flat, with most tokens
    removed, with NaN, with no token left, and one about which nothing is asked.

    step: every `step`-th id has a column. coarse: few different logits, so that ties are cut, too.
    """
    random = np.random.default_rng(seed)
    rows = _rows(random)
    num_best = 1 if vocab_size < 20 else 3  # none of the rows that are compared runs out of them
    rows["num_best"] = num_best
    num_rows = len(rows)
    wide = random.normal(0.0, 4.0, (num_rows, vocab_size + 3)).astype(np.float32)
    logits = wide[:, :vocab_size]  # a stride beyond the row
    if coarse:
        logits[:] = np.round(logits)
    logits[1, [vocab_size // 3, vocab_size - 1]] = 40.0
    logits[2] /= 1000
    if vocab_size > 20:
        logits[3, np.arange(vocab_size) % 7 != 2] = -np.inf
    logits[-3] = np.nan
    logits[-2] = -np.inf
    edits = _edits(random, rows, vocab_size)
    sources = random.permutation(num_rows - 1)  # rows are asked about in any order
    for i, row in enumerate(rows[:-1]):
        _move_edges(row, logits[i], edits[row["first_edit"] : row["end_edit"]])
        row["source"] = sources[i]
    shuffled = wide.copy()
    shuffled[sources] = wide[: num_rows - 1]
    list_size, raw_list_size = min(20, vocab_size), min(4, vocab_size)
    asked = AskedRows(rows, edits, num_best, list_size, raw_list_size)
    ids = ShardIds(torch.arange(vocab_size) * step + vocab_offset)
    return _prepared(shuffled, vocab_size, asked, ids, f"{seed}{', ties' * coarse}", step, device)


def _prepared(
    wide: Float32Array,
    vocab_size: int,
    asked: AskedRows,
    ids: ShardIds,
    name: str,
    step: int,
    device: torch.device,
) -> PreparedCase:
    on_host = asked.on_host()
    counts = list(asked.counts)
    parts = answer_parts(*counts)
    logits = torch.from_numpy(wide)
    expected = sample_shard_op(logits[:, :vocab_size], *on_host, ids.table, ids.first, counts)
    guards = Guards(device)
    answers = guards.empty((num_bytes_of(parts),), torch.uint8)
    there = guards.copy(logits)
    plan = plan_sample_shard(
        there[:, :vocab_size],
        on_host[0].to(device),
        on_host[1].to(device),
        guards.empty((len(asked.edits),), torch.float32),
        ids.table.to(device),
        ids.first,
        counts,
        answers,
    )
    every = "" if step == 1 else f", every {step}th id"
    return PreparedCase(
        f"sample_shard: {vocab_size} tokens{every}, {name}",
        "sample_shard",
        (plan,),
        (Check("logits", there, logits.clone(), 0), *_checks(answers, expected, asked)),
        tuple(guards.buffers),
        4 * vocab_size * (len(asked.rows) - 1),
        0,
    )


def _checks(answers: torch.Tensor, expected: torch.Tensor, asked: AskedRows) -> Iterator[Check]:
    """Of rows without a law only what is exact: relative errors of infinities and NaN are none."""
    parts, last = answer_parts(*asked.counts), len(asked.rows) - 1
    (sums, winners, *lists), (true_sums, true_winners, *true_lists) = (
        views_of(buffer, parts) for buffer in (answers, expected)
    )

    def of(name: str, records: np.dtype[Any], end: int, tolerance: float) -> Check:
        actual, wanted = (sums, true_sums) if records is SUMS else (winners, true_winners)
        assert records.fields is not None
        kind, offset = records.fields[name][:2]
        at = slice(offset, offset + kind.itemsize)
        if not tolerance:
            return Check(name, actual[:end, ..., at], wanted[:end, ..., at], 0)
        dtype = torch.float64 if kind.itemsize == 8 else torch.float32
        return Check(name, actual[:end, ..., at].view(dtype), wanted[:end, ..., at].view(dtype), tolerance)

    for name in ("sum", "kept_sum", "raw_sum"):
        yield of(name, SUMS, last - 2, 2e-6)
    yield of("maximum", SUMS, last, 0)
    yield of("column", WINNER, last, 0)
    first = [x[: last - 2, 0, :4].view(torch.float32) for x in (winners, true_winners)]
    yield Check("score", first[0], first[1], 2e-7)  # later ones may have run out
    for name in ("logit", "raw_logit"):
        yield of(name, WINNER, last - 2, 0)
    for name, actual, wanted in zip(("lists", "raw lists"), lists, true_lists, strict=True):
        yield Check(name, actual, wanted, 0)
    untouched = torch.full_like(true_winners[last], 256 + _UNTOUCHED)
    yield Check("nothing asked", winners[last], untouched, 0)


def _rows(random: np.random.Generator) -> Records:
    """The last three: NaN, nothing left, nothing asked."""
    laws: list[dict[str, float]] = [
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0},
        {"temperature": 1.8},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 3.0, "log_min_p": -1.0},
        {"temperature": 6.0, "top_k": 30, "top_p": 0.8, "log_min_p": -3.0},
        {"temperature": 0.0, "end_edit": 1},
        {"temperature": 1.1, "top_p": 0.95, "end_edit": 1},
        {"temperature": 1.0, "top_k": 10_000, "top_p": 0.99999},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_p": 0.9},
        {},
    ]
    rows = AskedRows.nothing(len(laws)).rows
    for i, law in enumerate(laws):
        for field, value in law.items():
            rows[i][field] = value
        rows[i]["key"] = noise_key(int(random.integers(1000)), 100 + i)
    rows["wants_sum"] = rows["wants_raw"] = 1
    with_list, with_raw = (random.random(len(rows)) < 0.5 for _ in range(2))
    for field, which in (("likeliest", with_list), ("raw_likeliest", with_raw)):
        which[-3:] = False  # NaN has no order
        rows[field] = np.where(which, which.cumsum() - 1, -1)
    rows[-1]["source"] = -1
    return rows


def _edits(random: np.random.Generator, rows: Records, vocab_size: int) -> Records:
    found, num_found = [], 0
    for row in rows:
        row["first_edit"] = num_found
        if row["end_edit"]:
            edits = np.zeros(min(vocab_size, 40), dtype=EDIT)
            edits["column"] = random.permutation(vocab_size)[: len(edits)]
            edits["bias"], edits["repetition"] = random.integers(-2, 9, len(edits)), 1.25
            edits["presence"], edits["frequency"] = 0.5, random.integers(0, 3, len(edits))
            found.append(edits)
            num_found += len(edits)
        row["end_edit"] = num_found
    return np.concatenate(found)


def _move_edges(row: Any, logits: Float32Array, edits: Records) -> None:
    """Put top-p and min-p in the middle between two tokens: what is left of float32 must not decide."""
    edited = logits.astype(np.float64)
    for edit in edits:
        x = logits[edit["column"]] + edit["bias"]
        x = x * edit["repetition"] if x < 0 else x / edit["repetition"]
        edited[edit["column"]] = x - edit["presence"] - edit["frequency"]
    if row["temperature"] == 0.0 or not np.isfinite(edited.max()):
        return
    falling = -np.sort(-edited)
    x = (falling - falling[0]) / row["temperature"]
    kept = len(x)
    if row["top_k"]:
        kept = int(np.count_nonzero(falling >= falling[min(row["top_k"], kept) - 1]))
    shares = np.exp(x[:kept]).cumsum() / np.exp(x[:kept]).sum()
    if row["top_p"] < 1.0:
        likely = int(np.count_nonzero(np.exp(x[:kept]) > 1e-3))
        place = max(1, min(int(np.count_nonzero(shares < row["top_p"])), likely - 1))
        row["top_p"] = (shares[place - 1] + shares[min(place, kept - 1)]) / 2
    if row["log_min_p"] > -np.inf:
        values = np.unique(x)[::-1]
        place = max(1, int(np.count_nonzero(values >= row["log_min_p"])))
        row["log_min_p"] = (values[place - 1] + values[min(place, len(values) - 1)]) / 2
