"""What is to be known of laws besides samples, over vocabulary shards: of the model's own law (temperature 1, nothing
edited or removed), and of p̃, the one that a request asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Int64Array
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import LOWEST, unpack_tokens
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.shards import Shard

_NUM_SUMS = 2  # of a row: its maximum, and the sum of exp(logit - maximum)


@dataclass(frozen=True, eq=False)
class LawQuestions:
    """What rules want to know besides what requests ask for."""

    rows: Int64Array  # [num_tokens]
    tokens: Int64Array  # [num_tokens]: the log-probability of each in its row, under both laws
    entropy_rows: Int64Array  # [num_entropies]: rows whose entropy under p̃ is wanted


_NOTHING = np.zeros(0, dtype=np.int64)
NO_QUESTIONS = LawQuestions(_NOTHING, _NOTHING, _NOTHING)


class RawLogprobs(NamedTuple):
    """Nats; zeros in rows that did not ask or are invalid."""

    logprobs: torch.Tensor  # float32 [num_rows], of the sampled tokens
    top_ids: torch.Tensor  # int64 [num_rows, num_top], likeliest first, ties by id
    top_logprobs: torch.Tensor  # float32 [num_rows, num_top]
    token_logprobs: torch.Tensor  # float32 [num_tokens] of the questions
    token_logits: torch.Tensor  # float32 [num_tokens] likewise


def raw_logprobs(
    shard: Shard,
    shard_ids: ShardIds,
    tokens: Int64Array,
    asking: Int64Array,
    num_top: int,
    questions: LawQuestions,
    valid: npt.NDArray[np.bool_],
    communicator: Communicator,
) -> RawLogprobs:
    """Under the model's own law; one exchange if anything is asked. Arguments are the same on every rank.

    Args:
        shard: this rank's logits as the model gave them, of the tokens `shard_ids`.
        tokens: int64 [num_rows], sampled from each row.
        asking: int64, rows whose sampled token and `num_top` likeliest are to be reported.
        num_top: at most the vocabulary.
        questions: what else is to be reported: their tokens.
        valid: bool [num_rows]; of the other rows nothing is reported.
    """
    result = RawLogprobs(
        torch.zeros(len(tokens)),
        torch.zeros(len(tokens), num_top, dtype=torch.int64),
        torch.zeros(len(tokens), num_top),
        torch.zeros(len(questions.tokens)),
        torch.zeros(len(questions.tokens)),
    )
    if not len(asking) and not len(questions.rows):
        return result
    asking = asking[valid[asking]]
    asked = np.flatnonzero(valid[questions.rows])
    chosen_rows = np.concatenate([asking, questions.rows[asked]])
    chosen = np.concatenate([tokens[asking], questions.tokens[asked]])
    if not len(chosen):
        return result
    rows, of_each = np.unique(chosen_rows, return_inverse=True)
    parts = [
        _sums(shard, rows).ravel(),
        _chosen_logits(shard, shard_ids, chosen_rows, chosen),
        _likeliest(shard, asking, num_top).ravel(),
    ]
    message = torch.from_numpy(np.concatenate(parts))
    gathered = communicator.all_gather(message).numpy()  # [size, length]
    sums, logits, top = np.split(gathered, np.cumsum([len(part) for part in parts[:-1]]), axis=1)
    largest, log_masses = _of_whole_rows(sums.reshape(len(sums), len(rows), _NUM_SUMS))
    of_asking = of_each[: len(asking)]
    chosen_logits = logits.max(axis=0)
    logprobs = chosen_logits - largest[of_each] - log_masses[of_each]
    result.logprobs.numpy()[asking] = logprobs[: len(asking)]
    result.token_logprobs.numpy()[asked] = logprobs[len(asking) :]
    result.token_logits.numpy()[asked] = chosen_logits[len(asking) :]
    if num_top > 0 and len(asking):
        both = np.concatenate(list(top.reshape(len(top), len(asking), 2, num_top)), axis=2)
        values, ids = both[:, 0], both[:, 1]
        order = np.lexsort((ids, -values))[:, :num_top]
        result.top_ids.numpy()[asking] = np.take_along_axis(ids, order, axis=1)
        values = np.take_along_axis(values, order, axis=1) - largest[of_asking, None]
        result.top_logprobs.numpy()[asking] = values - log_masses[of_asking, None]
    return result


def _sums(shard: Shard, rows: Int64Array) -> npt.NDArray[np.float64]:
    """[n, _NUM_SUMS]"""
    sums = np.zeros((len(rows), _NUM_SUMS))
    maxima = np.maximum(shard.maxima(rows), LOWEST)  # a shard of removed tokens has no mass
    sums[:, 0] = maxima
    sums[:, 1] = shard.exp_sums(rows, maxima, np.ones(len(rows), dtype=np.float32))
    return sums


def _chosen_logits(
    shard: Shard, shard_ids: ShardIds, rows: Int64Array, tokens: Int64Array
) -> npt.NDArray[np.float64]:
    """[n]; -inf where a token is not in this shard."""
    logits = np.full(len(tokens), -np.inf)
    own = np.flatnonzero(shard_ids.are_here(tokens))
    logits[own] = shard.logits(rows[own], tokens[own])
    return logits


def _likeliest(shard: Shard, rows: Int64Array, count: int) -> npt.NDArray[np.float64]:
    """[n, 2, count]: logits and ids of the likeliest tokens, and such as come last where the shard has fewer."""
    found = np.full((len(rows), 2, count), -np.inf)
    found[:, 1] = np.inf
    if count > 0 and len(rows):
        values, ids = unpack_tokens(shard.top(rows, count))
        found[:, 0, : values.shape[1]] = values
        found[:, 1, : ids.shape[1]] = ids
    return found


def _of_whole_rows(
    sums: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of each row, over the whole vocabulary, [n] each, from [size, n, _NUM_SUMS]: the largest logit, and the log of
    the sum of exp(logit - largest)."""
    maxima, masses = sums[:, :, 0], sums[:, :, 1]
    largest = maxima.max(axis=0)
    return largest, np.log(np.sum(np.exp(maxima - largest) * masses, axis=0))
