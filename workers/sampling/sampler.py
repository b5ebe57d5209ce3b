"""The one sampler: a token is the argmax over x of log p̃(x) + G(seed, position, x).

p̃ is the law after everything the request asked for (`law.py`), G is counter-based Gumbel noise
(`kernels/noise.py`), absent at temperature 0. Plain decoding and every node of a draft tree use it, and the
drafter proposes with the same noise; so a text is, seed for seed, the same for every way of drafting.

Logits stay on their ranks, and on a GPU whose kernel samples them (else they are copied to its host). The ranks
exchange each row's maximum, which says whether the row is a law at all, and their best (score, id); what rows with
truncation need besides is in `candidates.py`. All ranks return the same, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Float32Array, Int64Array
from outrider.kernels.sample_shard import MAX_LOGIT, Answers, AskedRows
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.shard_logits import DENSE, ShardLogits
from outrider.kernels.token_rows import REMOVED, UInt64Array, ids_of
from outrider.workers.link.communicator import Communicator
from outrider.workers.sampling.candidates import best_if_kept, foresee, kept_tokens, usual_list_size
from outrider.workers.sampling.context import RowParameters, SampledRows
from outrider.workers.sampling.device_shard import NOTHING_FORESEEN, DeviceShard
from outrider.workers.sampling.law import NO_EDITS, Edits, PlannedEdits, planned_edits
from outrider.workers.sampling.logprobs import NO_QUESTIONS, LawQuestions, raw_logprobs
from outrider.workers.sampling.masking import Masked, mask_rows
from outrider.workers.sampling.request_laws import request_laws
from outrider.workers.sampling.shards import Shard
from outrider.workers.sequences.vocabulary import Vocabulary


class Samples(NamedTuple):
    """Sampled tokens, and log-probabilities (nats) under the model's own law for rows that asked.

    A row is invalid if its logits, edited as the request asks, are no law: NaN or infinity among them, nothing
    left, or none within ±MAX_LOGIT. Its token is 0 and its log-probabilities are 0; the other rows are what they
    would be without it.
    """

    tokens: torch.Tensor  # int64 [num_rows]
    valid: torch.Tensor  # bool [num_rows]
    logprobs: torch.Tensor  # float32 [num_rows]; 0 where a row did not ask
    top_ids: torch.Tensor  # int64 [num_rows, k], likeliest first; k is the most that any row asks for
    top_logprobs: torch.Tensor  # float32 [num_rows, k]
    token_logprobs: torch.Tensor  # float32 [num_tokens] of the tokens asked about; 0 in an invalid row
    token_laws: (
        torch.Tensor
    )  # float32 [num_tokens] log p̃ of these; -inf where p̃ removes them, 0 in an invalid row
    is_pushed_down: torch.Tensor  # bool [num_tokens], whether the request's edits lower the token's logit
    entropies: torch.Tensor  # float32 [num_entropies] of p̃ in the rows asked about; 0 of an invalid row


NO_SAMPLES = Samples(
    tokens=torch.empty(0, dtype=torch.int64),
    valid=torch.empty(0, dtype=torch.bool),
    logprobs=torch.empty(0),
    top_ids=torch.empty(0, 0, dtype=torch.int64),
    top_logprobs=torch.empty(0, 0),
    token_logprobs=torch.empty(0),
    token_laws=torch.empty(0),
    is_pushed_down=torch.empty(0, dtype=torch.bool),
    entropies=torch.empty(0),
)
"""Of no rows."""


class Prepared(NamedTuple):
    """What `Sampler.sample` works out before it has seen logits."""

    groups: Sequence[SampledRows]
    questions: LawQuestions
    params: RowParameters
    edits: PlannedEdits
    foreseen: AskedRows

    @property
    def on_host(self) -> list[torch.Tensor]:
        """Tensors that may travel to the logits' device together with others."""
        return self.foreseen.on_host()


class _Edited(NamedTuple):
    """The rows of one call, edited."""

    params: RowParameters
    logits: torch.Tensor
    masked: Masked
    edits: Edits  # made here: a `DeviceShard` makes its own
    shard: Shard
    maxima: Float32Array  # [num_rows], over the whole vocabulary
    whole: Int64Array  # valid rows that nothing truncates
    truncated: Int64Array  # the other valid rows

    def undo(self) -> None:
        """Make the logits the model's own again."""
        self.edits.undo(self.logits)
        if isinstance(self.shard, DeviceShard):
            self.shard.undo()
        self.masked.undo(self.logits)


class Sampler:
    """Samples from logits of which this rank has those of a `vocabulary`.

    Together the ranks have all tokens that there are to choose from, in ascending order with the rank: those of the
    target, or the few that a drafter's head kept. p̃ is a law over these alone, whatever a request says of others;
    the noise belongs to token ids, so a token has the same noise in every vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        vocabulary: Vocabulary,
        communicator: Communicator,
        kernels: KernelSelection = REFERENCES,
    ) -> None:
        """
        Args:
            vocab_size: tokens of all ranks.
            vocabulary: of this rank; where the logits will be, if it is a table.
            kernels: with `sample_shard` rows are sampled where the logits are, else on the host.
        """
        assert 0 < len(vocabulary) <= vocab_size
        assert communicator.size > 1 or len(vocabulary) == vocab_size
        self._vocab_size = vocab_size
        self._ids = ShardIds(vocabulary.ids(torch.arange(len(vocabulary))))
        self._communicator = communicator
        self._kernels = kernels

    @property
    def ids(self) -> ShardIds:
        """Of the logits' columns."""
        return self._ids

    @property
    def list_size(self) -> int:
        """Of the likeliest tokens, where `prepare` foresees that they are asked for; a large top-k asks for more."""
        return usual_list_size(self._vocab_size, len(self._ids))

    def prepare(
        self, groups: Sequence[SampledRows], questions: LawQuestions = NO_QUESTIONS, num: int = 1
    ) -> Prepared:
        """For `sample_prepared`.

        Args:
            groups: what the rows are to be sampled for, in their order; the same on every rank.
            questions: what else is to be known of the laws; the same on every rank.
            num: tokens that will be asked for of each row.
        """
        params, edits = RowParameters(groups), planned_edits(groups, self._ids)
        foreseen = NOTHING_FORESEEN
        if self._kernels.sample_shard:
            foreseen = foresee(params, edits, self._vocab_size, len(self._ids), num, questions.rows)
        return Prepared(groups, questions, params, edits, foreseen)

    def sample(
        self, logits: torch.Tensor, groups: Sequence[SampledRows], questions: LawQuestions = NO_QUESTIONS
    ) -> Samples:
        """`sample_prepared` of what has not been prepared."""
        return self.sample_prepared(logits, self.prepare(groups, questions))

    @np.errstate(over="ignore")  # what leaves float32 downwards is as good as removed
    def sample_prepared(
        self,
        logits: torch.Tensor,
        prepared: Prepared,
        there: Sequence[torch.Tensor] = (),
        seen: Answers | None = None,
    ) -> Samples:
        """Sample one token per row.

        Args:
            logits: float32 [num_rows, len(vocabulary)], straight from the model. Edited while this runs, and as
                before when it returns.
            there: `prepared.on_host` on the logits' device, if it has been copied already.
            seen: what was foreseen, if it is known already.
        """
        batch, questions = self._edit(logits, prepared, there, seen), prepared.questions
        best = np.zeros(len(batch.maxima), dtype=np.uint64)  # token 0 where a row is invalid
        valid = np.zeros(len(best), dtype=np.bool_)
        if len(batch.whole):
            best[batch.whole], valid[batch.whole] = _best_whole(batch, 1)[:, 0], True
        if len(batch.truncated):
            valid[batch.truncated] = True
            self._choose_kept(batch, best)
        if self._communicator.size > 1:
            message = torch.from_numpy(best.view(np.int64))
            best = self._communicator.all_gather(message).numpy().view(np.uint64).min(axis=0)
        tokens = ids_of(best)
        laws = request_laws(
            batch.shard,
            self._ids,
            batch.maxima,
            batch.params,
            self._vocab_size,
            questions,
            valid,
            self._communicator,
        )
        batch.undo()
        raw = raw_logprobs(
            self._as_it_came(batch),
            self._ids,
            tokens,
            np.flatnonzero(batch.params.logprobs),
            batch.params.max_top_logprobs,
            questions,
            valid,
            self._communicator,
        )
        return Samples(
            tokens=torch.from_numpy(tokens),
            valid=torch.from_numpy(valid),
            logprobs=raw.logprobs,
            top_ids=raw.top_ids,
            top_logprobs=raw.top_logprobs,
            token_logprobs=raw.token_logprobs,
            token_laws=torch.from_numpy(laws.logprobs),
            is_pushed_down=torch.from_numpy(laws.logits < raw.token_logits.numpy()),
            entropies=torch.from_numpy(laws.entropies),
        )

    def propose(
        self, logits: torch.Tensor, groups: Sequence[SampledRows], num: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`propose_prepared` of what has not been prepared."""
        return self.propose_prepared(logits, self.prepare(groups, num=num), num)

    @np.errstate(over="ignore")
    def propose_prepared(
        self, logits: torch.Tensor, prepared: Prepared, num: int, there: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `num` best tokens of each row by log p̃ + G, for drafting: the first is what `sample` returns.

        Needs all tokens on this rank.

        Args:
            logits: float32 [num_rows, vocab_size]; edited while this runs, and as before when it returns.
            prepared: for `num` tokens.
            num: at most vocab_size.
            there: `prepared.on_host` on the logits' device, if it has been copied already.

        Returns:
            ids int64 [num_rows, num], distinct within a row, best first, and log p̃ of each, float32
            [num_rows, num]: -inf for tokens that p̃ removes, which stand last and only where p̃ leaves fewer
            than `num`, and for all of an invalid row. A greedy row is ranked by logits, its log-probabilities
            are those of temperature 1.
        """
        assert self._communicator.size == 1
        assert num <= self._vocab_size
        batch = self._edit(logits, prepared, there)
        ids = np.empty((len(batch.maxima), num), dtype=np.int64)
        ids[:] = self._ids.all[:num]
        log_probs = np.full(ids.shape, -np.inf, dtype=np.float32)
        temperatures = batch.params.temperatures
        temperatures = temperatures + (temperatures == 0.0)
        if len(batch.whole):
            rows = batch.whole
            masses = batch.shard.exp_sums(rows, batch.maxima[rows], temperatures[rows])
            ids[rows], log_probs[rows] = _law_of_best(
                batch, rows, _best_whole(batch, num), masses, temperatures
            )
        if len(batch.truncated):
            rows = batch.truncated
            ids[rows], log_probs[rows] = _law_of_best(
                batch, rows, *self._best_kept(batch, rows, num), temperatures
            )
        batch.undo()
        return torch.from_numpy(ids), torch.from_numpy(log_probs)

    def _edit(
        self,
        logits: torch.Tensor,
        prepared: Prepared,
        there: Sequence[torch.Tensor],
        seen: Answers | None = None,
    ) -> _Edited:
        params = prepared.params
        assert logits.shape == (params.num_rows, len(self._ids))
        if not self._kernels.sample_shard:
            logits = logits.cpu().contiguous()
        masked, edits = mask_rows(logits, prepared.groups, self._ids), NO_EDITS
        shard: Shard
        if self._kernels.sample_shard:
            shard = DeviceShard(logits, self._ids, self._kernels, prepared.foreseen, there, seen)
        else:
            edits = prepared.edits.make(logits)
            shard = ShardLogits(logits, self._ids)
        maxima = shard.maxima(np.arange(params.num_rows))
        if self._communicator.size > 1:
            maxima = self._communicator.all_gather(torch.from_numpy(maxima)).numpy().max(axis=0)
        valid = np.abs(maxima) <= MAX_LOGIT  # NaN if any rank's is, and then not
        truncated = (valid & params.truncates).nonzero()[0]
        whole = (valid & ~params.truncates).nonzero()[0]
        return _Edited(params, logits, masked, edits, shard, maxima, whole, truncated)

    def _as_it_came(self, batch: _Edited) -> Shard:
        """Of the model's own logits, which they are again."""
        if isinstance(batch.shard, DeviceShard):
            if len(batch.masked.rows):
                return DeviceShard(batch.logits, self._ids, self._kernels)
            return batch.shard.as_it_came()
        is_changed = len(batch.masked.rows) > 0 or len(batch.edits.rows) > 0
        return ShardLogits(batch.logits, self._ids) if is_changed else batch.shard

    def _choose_kept(self, batch: _Edited, best: UInt64Array) -> None:
        """The packed tokens of truncated rows, into best [num_rows]."""
        rows, shard = batch.truncated, batch.shard
        if (
            isinstance(shard, ShardLogits) and self._communicator.size == 1 and self._vocab_size <= DENSE
        ):  # whole rows are here, and cheap to look at
            best[rows], is_sure = best_if_kept(shard, rows, batch.maxima[rows], batch.params)
            rows = rows[~is_sure]
        if len(rows):
            best[rows] = self._best_kept(batch, rows, 1)[0][:, 0]

    def _best_kept(
        self, batch: _Edited, rows: Int64Array, num: int
    ) -> tuple[UInt64Array, npt.NDArray[np.float64]]:
        """Of truncated rows [n, num] packed tokens with their scores, and [n] the masses of what is kept."""
        params = batch.params
        if isinstance(batch.shard, DeviceShard) and self._communicator.size == 1:
            return batch.shard.best_foreseen(rows)
        kept = kept_tokens(
            batch.shard, rows, batch.maxima[rows], params, self._vocab_size, self._communicator
        )
        ranked = batch.shard.best_kept(
            rows, kept.lowest, kept.num_lowest, params.temperatures[rows], params.keys[rows], num
        )
        return ranked, kept.masses


def _law_of_best(
    batch: _Edited,
    rows: Int64Array,
    ranked: UInt64Array,
    masses: npt.NDArray[np.float64],
    temperatures: Float32Array,
) -> tuple[Int64Array, Float32Array]:
    """Ids of packed tokens, [n, num], and their log-probabilities, -inf where p̃ removes them.

    masses: [n], of each row the sum over what is kept of exp((logit - maximum) / temperature).
    """
    ids = ids_of(ranked)
    num = ids.shape[1]
    log_probs = batch.shard.logits(rows.repeat(num), ids.reshape(-1)).reshape(-1, num)
    log_probs -= batch.maxima[rows, None]
    log_probs /= temperatures[rows, None]
    log_probs -= np.log(masses).astype(np.float32)[:, None]
    log_probs[ranked >= REMOVED] = -np.inf
    return ids, log_probs


def _best_whole(batch: _Edited, num: int) -> UInt64Array:
    """Of the rows that nothing truncates [n, num] packed tokens with their scores."""
    rows, params = batch.whole, batch.params
    temperatures = params.temperatures[rows]
    # Greedy rows have no noise.
    is_noisy = np.count_nonzero(temperatures) > 0
    keys = params.keys[rows] if is_noisy else np.zeros((len(rows), 2), dtype=np.uint32)
    return batch.shard.best(rows, temperatures, keys, num)
