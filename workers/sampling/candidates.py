"""What truncation keeps of rows, found over vocabulary shards without gathering logits.

Every rank sends its largest logits of each row. What top-k, top-p and min-p keep is a prefix of the merged list,
and it is final once it ends above the last one that any rank sent; rows where it does not go round again with
more logits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Float32Array, Int64Array
from outrider.kernels.sample_shard import MAX_LIST, AskedRows
from outrider.kernels.shard_logits import ShardLogits
from outrider.kernels.token_rows import UInt64Array, count_true, ids_of, parts_of_rows
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.context import RowParameters
from outrider.workers.sampling.law import Nuclei, PlannedEdits, nuclei
from outrider.workers.sampling.shards import Shard

_FIRST_COUNT = 128  # logits a rank sends per row at first: most nuclei of 0.95 are smaller
_SMALL_VOCABULARY = 512  # of which a rank sends all it has
_GROWTH = 8
_MOST_FORESEEN = (
    1025  # likeliest tokens of a row that are brought to the host before it is known what is needed
)
_SURE = 1e-4  # distance from the edge of a nucleus, many times the rounding of float32 sums


def kept_tokens(
    shard: Shard,
    rows: Int64Array,
    maxima: Float32Array,
    params: RowParameters,
    vocab_size: int,
    communicator: Communicator,
) -> Nuclei:
    """Truncate `rows` of the batch. `num_lowest` counts this rank's tokens; the rest every rank gets alike.

    Args:
        shard: this rank's logits, edited and not divided by the temperature.
        rows: int64 [n], the rows to truncate; temperatures > 0.
        maxima: [n], the largest logit of each over the whole vocabulary, finite.
        params: of the batch.
    """
    sends_all = vocab_size <= _SMALL_VOCABULARY
    if sends_all and communicator.size == 1:
        return _of_all(shard, rows, params, vocab_size)
    sums = np.zeros(len(rows))
    summed = _are_summed(params, rows).nonzero()[0]
    if len(summed) and not sends_all:
        chosen = rows[summed]
        sums[summed] = shard.exp_sums(chosen, maxima[summed], params.temperatures[chosen])
    result = Nuclei(np.empty_like(maxima), np.empty(len(rows), dtype=np.int64), np.empty(len(rows)))
    pending = np.arange(len(rows))
    count = _first_count(params, rows, vocab_size)
    while len(pending):
        totals, logits = sums[pending], shard.largest(rows[pending], count)[None]
        sent_all = logits.shape[2] < count
        if communicator.size > 1:
            message = torch.from_numpy(_pack(totals, logits[0], count))
            gathered = communicator.all_gather(message).numpy()  # [size, num_pending, 2 + count]
            totals = np.ascontiguousarray(gathered[:, :, :2]).view(np.float64)[:, :, 0].sum(axis=0)
            logits, sent_all = gathered[:, :, 2:], False
        unfinished = []
        for part in parts_of_rows(len(pending), logits[:, 0].size):
            some, own = logits[:, part], pending[part]
            floors = some[:, :, -1].max(axis=0)
            if sent_all:
                floors = np.full(len(own), -np.inf, dtype=np.float32)
            found, certain = nuclei(
                _merged(some), floors, None if sends_all else totals[part], params, rows[own]
            )
            if communicator.size > 1:
                found = _share(found, some, communicator.rank)
            result[own[certain]] = found[certain]
            unfinished.append(own[~certain])
        pending = np.concatenate(unfinished)
        count *= _GROWTH
    return result


def _of_all(shard: Shard, rows: Int64Array, params: RowParameters, vocab_size: int) -> Nuclei:
    """`kept_tokens` of the only rank, which sorts all it has; a few rows at a time stay in the processor's cache."""
    result = Nuclei(np.empty(len(rows), np.float32), np.empty(len(rows), np.int64), np.empty(len(rows)))
    for part in parts_of_rows(len(rows), vocab_size):
        some = rows[part]
        nothing_missing = np.full(len(some), -np.inf, dtype=np.float32)
        result[part], _ = nuclei(shard.largest(some, vocab_size), nothing_missing, None, params, some)
    return result


def foresee(
    params: RowParameters,
    edits: PlannedEdits,
    vocab_size: int,
    shard_size: int,
    num: int,
    told_rows: Int64Array,
) -> AskedRows:
    """What sampling will ask of one rank's logits of a batch, if all is as it mostly is, to see it at once.

    Args:
        vocab_size, shard_size: the same where a rank is alone: then it sees what truncation keeps.
        num: how many tokens will be asked for of each row; of more than one, laws are.
        told_rows: int64, of which the model's own law is asked for, as of those whose requests do.
    """
    truncates, is_noisy = params.truncates, np.count_nonzero(params.temperatures) > 0
    rows = AskedRows.nothing(params.num_rows).rows
    rows["temperature"] = params.temperatures
    if is_noisy:  # greedy rows have no noise
        rows["key"] = params.keys
    rows["wants_sum"] = num > 1
    rows["num_best"] = num
    list_size = 0
    if np.count_nonzero(truncates) and shard_size == vocab_size:
        rows["top_k"], rows["top_p"] = params.top_k, params.top_p
        with np.errstate(divide="ignore"):
            rows["log_min_p"] = np.log(params.min_p)
    elif np.count_nonzero(truncates):
        chosen = truncates.nonzero()[0]
        count = _first_count(params, chosen, vocab_size)
        rows["num_best"][chosen] = 0
        if vocab_size > _SMALL_VOCABULARY:
            rows["wants_sum"][chosen] = _are_summed(params, chosen)
        if count <= _MOST_FORESEEN:
            rows["likeliest"][chosen], list_size = np.arange(len(chosen)), min(count, shard_size)
    told = np.flatnonzero(params.logprobs)
    rows["wants_raw"][told] = rows["wants_raw"][told_rows] = 1
    raw_list_size = min(params.max_top_logprobs, shard_size, MAX_LIST)
    if raw_list_size:
        rows["raw_likeliest"][told] = np.arange(len(told))
    ends = edits.rows.searchsorted(np.arange(params.num_rows), side="right")
    rows["first_edit"][1:], rows["end_edit"] = ends[:-1], ends
    return AskedRows(rows, edits.edits, num if len(rows) else 0, list_size, raw_list_size)


def usual_list_size(vocab_size: int, shard_size: int) -> int:
    """Of the likeliest tokens that `foresee` asks for where rows are truncated, but with a large top-k; 0: none."""
    return 0 if shard_size == vocab_size else min(_fewest(vocab_size), shard_size)


def _first_count(params: RowParameters, rows: Int64Array, vocab_size: int) -> int:
    """How many logits a rank sends at first."""
    fewest = _fewest(vocab_size)
    return (
        fewest if vocab_size <= _SMALL_VOCABULARY else max(fewest, 1 + int(params.top_k[rows].max(initial=0)))
    )


def _fewest(vocab_size: int) -> int:
    """Of a small vocabulary, all and one: a rank that has sent all it has ends with -inf."""
    return vocab_size + 1 if vocab_size <= _SMALL_VOCABULARY else _FIRST_COUNT


def _are_summed(params: RowParameters, rows: Int64Array) -> npt.NDArray[np.bool_]:
    return (params.top_p[rows] < 1.0) & (params.top_k[rows] == 0)


def best_if_kept(
    shard: ShardLogits, rows: Int64Array, maxima: Float32Array, params: RowParameters
) -> tuple[UInt64Array, npt.NDArray[np.bool_]]:
    """The token that would win if nothing were removed, and whether top-p and min-p surely keep it: then it wins.

    Most do, and that is seen without ordering anything. Rows with top-k are never sure.

    Args: as in `kept_tokens`; `shard` has the whole vocabulary.

    Returns:
        uint64 [n], packed with its score; bool [n].
    """
    temperatures = params.temperatures[rows]
    best = shard.best(rows, temperatures, params.keys[rows], 1)[:, 0]
    logits = shard.logits(rows, ids_of(best))
    sums, sums_from = shard.masses_from(rows, maxima, temperatures, logits)
    x = (logits - maxima) / temperatures
    limits = np.where(params.top_p[rows] < 1.0, params.top_p[rows] * (1.0 - _SURE), np.inf)
    is_sure = sums_from - np.exp(x) < limits * sums
    with np.errstate(divide="ignore"):
        is_sure &= x * (1.0 + _SURE) - _SURE >= np.log(params.min_p[rows])
    is_sure &= params.top_k[rows] == 0
    return best, is_sure


def _pack(sums: np.ndarray, logits: Float32Array, count: int) -> Float32Array:
    """[num_rows, 2 + count]: the float64 sums as two words each, logits, and -inf where there are no more."""
    message = np.full((len(sums), 2 + count), -np.inf, dtype=np.float32)
    message[:, :2] = sums.view(np.float32).reshape(-1, 2)
    message[:, 2 : 2 + logits.shape[1]] = logits
    return message


def _merged(logits: Float32Array) -> Float32Array:
    """[num_rows, size * count], largest first, of [size, num_rows, count]."""
    if len(logits) == 1:
        return logits[0]
    falling = -np.concatenate(list(logits), axis=1)
    falling.sort(axis=1)
    return np.negative(falling, out=falling)


def _share(found: Nuclei, logits: Float32Array, rank: int) -> Nuclei:
    """Of the tokens equal to the lowest, which go by their ids, those that fall to this rank."""
    num_equal = count_true(logits == found.lowest[:, None])  # [size, num_rows]
    left = np.maximum(found.num_lowest - num_equal[:rank].sum(axis=0), 0)
    return Nuclei(found.lowest, np.minimum(left, num_equal[rank]), found.masses)
