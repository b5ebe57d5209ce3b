"""What is to be known of the model's own law (temperature 1, nothing edited or removed), over vocabulary shards."""

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

_NUM_SUMS = (
    3  # of a row: its maximum, the sum of exp(x) and that of x * exp(x), x being the logit less the maximum
)


@dataclass(frozen=True, eq=False)
class LawQuestions:
    """What rules want to know besides what requests ask for."""

    rows: Int64Array  # [num_tokens]
    tokens: Int64Array  # [num_tokens]: the log-probability of each in its row
    entropy_rows: Int64Array  # [num_entropies]: rows whose entropy is wanted


_NOTHING = np.zeros(0, dtype=np.int64)
NO_QUESTIONS = LawQuestions(_NOTHING, _NOTHING, _NOTHING)


class RawLogprobs(NamedTuple):
    """Nats; zeros in rows that did not ask or are invalid."""

    logprobs: torch.Tensor  # float32 [num_rows], of the sampled tokens
    top_ids: torch.Tensor  # int64 [num_rows, num_top], likeliest first, ties by id
    top_logprobs: torch.Tensor  # float32 [num_rows, num_top]
    token_logprobs: torch.Tensor  # float32 [num_tokens] of the questions
    entropies: torch.Tensor  # float32 [num_entropies] of the questions


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
    """Log-probabilities and entropies; one exchange if anything is asked. Arguments are the same on every rank.

    Args:
        shard: this rank's logits as the model gave them, of the tokens `shard_ids`.
        tokens: int64 [num_rows], sampled from each row.
        asking: int64, rows whose sampled token and `num_top` likeliest are to be reported.
        num_top: at most the vocabulary.
        questions: what else is to be reported.
        valid: bool [num_rows]; of the other rows nothing is reported.
    """
    result = RawLogprobs(
        torch.zeros(len(tokens)),
        torch.zeros(len(tokens), num_top, dtype=torch.int64),
        torch.zeros(len(tokens), num_top),
        torch.zeros(len(questions.tokens)),
        torch.zeros(len(questions.entropy_rows)),
    )
    asking = asking[valid[asking]]
    asked, entropic = np.flatnonzero(valid[questions.rows]), np.flatnonzero(valid[questions.entropy_rows])
    chosen_rows = np.concatenate([asking, questions.rows[asked]])
    chosen = np.concatenate([tokens[asking], questions.tokens[asked]])
    all_rows = np.concatenate([chosen_rows, questions.entropy_rows[entropic]])
    if not len(all_rows):
        return result
    rows, of_each = np.unique(all_rows, return_inverse=True)
    parts = [
        _sums(shard, rows, with_entropy=len(entropic) > 0).ravel(),
        _chosen_logits(shard, shard_ids, chosen_rows, chosen),
        _likeliest(shard, asking, num_top).ravel(),
    ]
    message = torch.from_numpy(np.concatenate(parts))
    gathered = communicator.all_gather(message).numpy()  # [size, length]
    sums, logits, top = np.split(gathered, np.cumsum([len(part) for part in parts[:-1]]), axis=1)
    largest, log_masses, means = _of_whole_rows(sums.reshape(len(sums), len(rows), _NUM_SUMS))
    of_chosen, of_asking = of_each[: len(chosen)], of_each[: len(asking)]
    logprobs = logits.max(axis=0) - largest[of_chosen] - log_masses[of_chosen]
    result.logprobs.numpy()[asking] = logprobs[: len(asking)]
    result.token_logprobs.numpy()[asked] = logprobs[len(asking) :]
    result.entropies.numpy()[entropic] = (log_masses - means)[of_each[len(chosen) :]]
    if num_top > 0 and len(asking):
        both = np.concatenate(list(top.reshape(len(top), len(asking), 2, num_top)), axis=2)
        values, ids = both[:, 0], both[:, 1]
        order = np.lexsort((ids, -values))[:, :num_top]
        result.top_ids.numpy()[asking] = np.take_along_axis(ids, order, axis=1)
        values = np.take_along_axis(values, order, axis=1) - largest[of_asking, None]
        result.top_logprobs.numpy()[asking] = values - log_masses[of_asking, None]
    return result


def _sums(shard: Shard, rows: Int64Array, with_entropy: bool) -> npt.NDArray[np.float64]:
    """[n, _NUM_SUMS]; the last sum is 0 where nobody wants entropies."""
    sums = np.zeros((len(rows), _NUM_SUMS))
    maxima = np.maximum(shard.maxima(rows), LOWEST)  # a shard of removed tokens has no mass
    sums[:, 0] = maxima
    sums[:, 1] = shard.exp_sums(rows, maxima, np.ones(len(rows), dtype=np.float32))
    if with_entropy:
        sums[:, 2] = shard.weighted_sums(rows, maxima)
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
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of each row, over the whole vocabulary, [n] each, from [size, n, _NUM_SUMS]: the largest logit, and with x
    the logit less that the log of the sum of exp(x) and the mean of x under the law."""
    maxima, masses, weighted = sums[:, :, 0], sums[:, :, 1], sums[:, :, 2]
    largest = maxima.max(axis=0)
    shares = np.exp(maxima - largest)
    total = np.sum(shares * masses, axis=0)
    means = np.sum(shares * (weighted + (maxima - largest) * masses), axis=0) / total
    return largest, np.log(total), means
