"""What is to be known of p̃, the law that a request asks for, besides a sample of it; over vocabulary shards.

Of a greedy request it is the law at temperature 1, as in `Sampler.propose`: the one at 0 says nothing that its sample
does not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Float32Array, Int64Array
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import unpack_tokens
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.candidates import kept_tokens
from outrider.workers.sampling.context import RowParameters
from outrider.workers.sampling.law import Nuclei
from outrider.workers.sampling.logprobs import LawQuestions
from outrider.workers.sampling.shards import Shard

_FIRST_COUNT = 128  # tokens looked at first: most nuclei of 0.95 are smaller
_GROWTH = 8


class RequestLaws(NamedTuple):
    """Answers to `LawQuestions`; zeros of rows that are invalid."""

    logprobs: Float32Array  # [num_tokens] log p̃, nats; -inf of tokens that p̃ removes
    logits: Float32Array  # [num_tokens], as edited; -inf likewise
    entropies: Float32Array  # [num_entropies] nats


def request_laws(
    shard: Shard,
    shard_ids: ShardIds,
    maxima: Float32Array,
    params: RowParameters,
    vocab_size: int,
    questions: LawQuestions,
    valid: npt.NDArray[np.bool_],
    communicator: Communicator,
) -> RequestLaws:
    """One exchange if anything is asked, and those of `kept_tokens`. Arguments are the same on every rank.

    Args:
        shard: this rank's logits, edited, of the tokens `shard_ids`.
        maxima: [num_rows], of the whole vocabulary.
        params: of the rows.
        valid: bool [num_rows]; of the other rows nothing is told.
    """
    answers = RequestLaws(
        np.zeros(len(questions.tokens), dtype=np.float32),
        np.zeros(len(questions.tokens), dtype=np.float32),
        np.zeros(len(questions.entropy_rows), dtype=np.float32),
    )
    if not len(questions.rows) and not len(questions.entropy_rows):
        return answers
    asked, entropic = np.flatnonzero(valid[questions.rows]), np.flatnonzero(valid[questions.entropy_rows])
    token_rows, tokens = questions.rows[asked], questions.tokens[asked]
    rows, of_each = np.unique(
        np.concatenate([token_rows, questions.entropy_rows[entropic]]), return_inverse=True
    )
    if not len(rows):
        return answers
    temperatures = params.temperatures[rows]
    temperatures = temperatures + (temperatures == 0.0)
    sums = np.zeros((len(rows), 2))  # of exp(x) and x * exp(x), x being (logit - maximum) / temperature
    logits = np.full(len(tokens), -np.inf)
    here = shard_ids.are_here(tokens)
    is_cut = params.truncates[rows]
    whole = np.flatnonzero(~is_cut)
    if len(whole):
        of_whole = rows[whole], maxima[rows[whole]], temperatures[whole]
        sums[whole, 0] = shard.exp_sums(*of_whole)
        sums[whole, 1] = shard.weighted_sums(*of_whole) if len(entropic) else 0.0
        own = np.flatnonzero(here & ~params.truncates[token_rows])
        logits[own] = shard.logits(token_rows[own], tokens[own])
    cut = np.flatnonzero(is_cut)
    if len(cut):
        cut_rows = rows[cut]
        kept = kept_tokens(shard, cut_rows, maxima[cut_rows], params, vocab_size, communicator)
        values, ids, is_kept = _kept_here(shard, cut_rows, kept, len(shard_ids))
        x = (values.astype(np.float64) - maxima[cut_rows, None]) / temperatures[cut, None]
        x[~is_kept] = 0.0
        weights = np.exp(x) * is_kept
        sums[cut] = np.stack([weights.sum(axis=1), (x * weights).sum(axis=1)], axis=1)
        own = np.flatnonzero(here & params.truncates[token_rows])
        place = np.searchsorted(cut_rows, token_rows[own])
        is_it = (ids[place] == tokens[own, None]) & is_kept[place]
        logits[own] = np.where(is_it, values[place], -np.inf).max(axis=1, initial=-np.inf)
    message = torch.from_numpy(np.concatenate([sums.ravel(), logits]))
    gathered = communicator.all_gather(message).numpy()  # [size, length]
    masses, weighted = gathered[:, : sums.size].sum(axis=0).reshape(-1, 2).T
    logits = gathered[:, sums.size :].max(axis=0)
    log_masses = np.log(masses)
    of_token = of_each[: len(tokens)]
    answers.logits[asked] = logits
    x = (logits - maxima[token_rows]) / temperatures[of_token]
    answers.logprobs[asked] = x - log_masses[of_token]
    answers.entropies[entropic] = (log_masses - weighted / masses)[of_each[len(tokens) :]]
    return answers


def _kept_here(
    shard: Shard, rows: Int64Array, kept: Nuclei, shard_size: int
) -> tuple[Float32Array, Int64Array, npt.NDArray[np.bool_]]:
    """Logits and ids of this rank, [n, width] each, among them all that truncation keeps of these rows, and which
    they are."""
    count = _FIRST_COUNT
    while True:
        values, ids = unpack_tokens(shard.top(rows, count))
        equal = values == kept.lowest[:, None]
        is_kept = equal & (equal.cumsum(axis=1) <= kept.num_lowest[:, None])
        is_kept |= values > kept.lowest[:, None]
        if count >= shard_size or not np.count_nonzero(is_kept[:, -1]):
            return values, ids, is_kept
        count *= _GROWTH
