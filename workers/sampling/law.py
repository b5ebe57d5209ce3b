"""The law p̃ a request asks for, as functions of few logits.

Edits (logit bias, repetition, presence and frequency penalties) touch the ids they name and are made in
place. Truncation (top-k, top-p, min-p) keeps a prefix of the tokens in order of falling logits, so it is
decided from a sorted list of the likeliest. Same order and same rules as transformers' LogitsProcessors;
presence and frequency penalties are those of the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Float32Array, Int64Array
from outrider.kernels.sample_shard import EDIT, Records
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.token_rows import count_true, exponentials
from outrider.kernels.transfers import upload
from outrider.workers.sampling.context import RowParameters, SampledRows


class Edits(NamedTuple):
    """What `edit_rows` overwrote: logits float32 [num_edited] at (rows, columns), int64 [num_edited]."""

    rows: torch.Tensor
    columns: torch.Tensor
    logits: torch.Tensor

    def undo(self, logits: torch.Tensor) -> None:
        if self.rows.numel():
            logits[self.rows, self.columns] = self.logits


_NO_ROWS = torch.empty(0, dtype=torch.int64)
NO_EDITS = Edits(_NO_ROWS, _NO_ROWS, torch.empty(0))


@dataclass(frozen=True)
class PlannedEdits:
    """Logit bias and penalties of a batch, in one shard."""

    rows: Int64Array  # [num_edits], ascending
    edits: Records  # EDIT [num_edits]

    def make(self, logits: torch.Tensor) -> Edits:
        """In place, where the logits are; nothing is brought to the host."""
        if not len(self.rows):
            return NO_EDITS
        on_host = (self.rows, *(np.ascontiguousarray(self.edits[field]) for field in EDIT.names or ()))
        rows, columns, bias, repetition, presence, frequency = upload(
            [torch.from_numpy(each) for each in on_host], logits.device
        )
        columns = columns.long()
        original = logits[rows, columns]
        edited = original + bias
        edited = torch.where(edited < 0, edited * repetition, edited / repetition)
        edited -= presence
        edited -= frequency
        logits[rows, columns] = edited
        return Edits(rows, columns, original)


def planned_edits(groups: Sequence[SampledRows], shard_ids: ShardIds) -> PlannedEdits:
    """What logit bias and penalties do.

    Args:
        shard_ids: the token of each column; what is to be done to others is left to who has them, if anybody.
        groups: what the rows are sampled for, in their order.
    """
    editing, end = [], 0
    for group in groups:
        first, end = end, end + len(group.positions)
        if group.params.edits_logits and len(group.positions):
            tokens = _EditedTokens(group, shard_ids)
            if len(tokens.columns):
                editing.append((tokens, first, end))
    rows = [np.repeat(np.arange(a, b), len(tokens.columns)) for tokens, a, b in editing]
    edits = np.zeros(sum(map(len, rows)), dtype=EDIT)
    if editing:
        edits["column"] = np.concatenate([np.tile(tokens.columns, b - a) for tokens, a, b in editing])
        amounts = np.concatenate([tokens.amounts(b - a) for tokens, a, b in editing], axis=1)
        edits["bias"], edits["repetition"], edits["presence"], edits["frequency"] = amounts
    return PlannedEdits(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64), edits)


def edit_rows(logits: torch.Tensor, groups: Sequence[SampledRows], shard_ids: ShardIds) -> Edits:
    """Apply logit bias and penalties in place to float32 [num_rows, shard_size]; see `planned_edits`."""
    return planned_edits(groups, shard_ids).make(logits)


class _EditedTokens:
    """The tokens of one shard that a group's parameters edit: those of the context first, then others with a bias."""

    def __init__(self, group: SampledRows, shard_ids: ShardIds) -> None:
        self._params = params = group.params
        ids = np.zeros(0, dtype=np.int64)
        if params.uses_context:
            ids, self._counts, self._seen = group.penalties.along(group.paths or [()] * len(group.positions))
        bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        all_ids = np.concatenate([ids, bias_ids[~np.isin(bias_ids, ids)]])
        local = shard_ids.are_here(all_ids)
        self._local_ids = all_ids[local]
        self.columns = shard_ids.columns(self._local_ids)
        if params.uses_context:
            self._counts, self._seen = self._counts[:, local[: len(ids)]], self._seen[:, local[: len(ids)]]

    def amounts(self, num_rows: int) -> Float32Array:
        """[4, num_rows * num_columns] what is done to each logit, in this order: bias, which is added; the factor of
        the repetition penalty; then what presence and frequency take away.

        The counts say how often the output has each: 0 for a token that only the prompt has.
        """
        params = self._params
        found = np.zeros((4, num_rows, len(self.columns)), dtype=np.float32)
        found[1] = 1.0
        bias = dict(params.logit_bias)
        if bias:
            found[0] = [bias.get(token, 0.0) for token in self._local_ids.tolist()]
        if params.uses_context:
            _, factors, presence, frequency = found[:, :, : self._counts.shape[1]]
            factors[self._seen] = params.repetition_penalty
            presence[self._seen & (self._counts > 0)] = params.presence_penalty
            frequency[:] = np.float32(params.frequency_penalty) * self._counts.astype(np.float32)
        return found.reshape(4, -1)


_MOST_NUCLEI = 128
"""Candidates that are looked at first where top-p alone truncates: most nuclei of 0.95 are smaller."""


@dataclass(frozen=True)
class Nuclei:
    """What truncation keeps of several rows: every logit above `lowest`, and of those equal to it the first
    `num_lowest` by id."""

    lowest: Float32Array  # [num_rows]
    num_lowest: Int64Array  # [num_rows]
    masses: npt.NDArray[
        np.float64
    ]  # [num_rows]: sum over the kept of exp((logit - largest logit) / temperature)

    def __getitem__(self, rows: npt.NDArray[Any] | slice) -> Nuclei:
        return Nuclei(self.lowest[rows], self.num_lowest[rows], self.masses[rows])

    def __setitem__(self, rows: npt.NDArray[Any] | slice, some: Nuclei) -> None:
        self.lowest[rows], self.num_lowest[rows], self.masses[rows] = (
            some.lowest,
            some.num_lowest,
            some.masses,
        )


def nuclei(
    logits: Float32Array,
    floors: Float32Array,
    totals: npt.NDArray[np.float64] | None,
    params: RowParameters,
    rows: Int64Array,
) -> tuple[Nuclei, npt.NDArray[np.bool_]]:
    """What top-k, top-p and min-p leave of rows, and of which rows that is certain, bool [n].

    Args:
        logits: float32 [n, num_candidates], the largest of the vocabulary, largest first.
        floors: float32 [n]: logits up to here may be missing; -inf where none are.
        totals: [n], sums over the vocabulary of exp((logit - largest logit) / temperature), only looked at
            where top-p is asked for and top-k is not; None if `logits` are the whole vocabulary's.
        params: of a batch; temperatures > 0.
        rows: int64 [n], which rows of the batch these are.
    """
    top_k, top_p, min_p = params.top_k[rows], params.top_p[rows], params.min_p[rows]
    weights = exponentials(logits, logits[:, 0], params.temperatures[rows])
    if totals is None:
        totals = torch.from_numpy(weights).sum(dim=1, dtype=torch.float64).numpy()
    masses = _prefix_masses(weights[:, :_MOST_NUCLEI])
    is_cut = masses.shape[1] < weights.shape[1]
    if is_cut and np.count_nonzero((top_k > 0) | (top_p == 1.0) | (masses[:, -1] < top_p * totals)):
        masses = _prefix_masses(weights)
    logits = logits[:, : masses.shape[1]]
    num, width = logits.shape
    kept = np.full(num, width, dtype=np.int64)
    each = np.arange(num)
    certain = np.ones(num, dtype=np.bool_)
    if np.count_nonzero(top_k):
        kth = logits[each, np.minimum(top_k, width) - 1]
        limited = (top_k > 0) & (top_k < width)
        kept[limited] = count_true(logits[limited] >= kth[limited, None])
        certain[limited] = kth[limited] > floors[limited]
    if np.count_nonzero(top_p < 1.0):
        limits = top_p * np.where(top_k > 0, masses[each, kept - 1], totals)
        limits[top_p == 1.0] = np.inf
        kept = np.minimum(kept, 1 + count_true(masses[:, :-1] < limits[:, None]))
    if np.count_nonzero(min_p):
        asking = np.flatnonzero(min_p)
        x = (logits[asking] - logits[asking, :1]).astype(np.float64) / params.temperatures[rows[asking], None]
        likely = count_true(x >= np.log(min_p[asking])[:, None])
        kept[asking] = np.minimum(kept[asking], likely)
    lowest = logits[each, kept - 1]
    num_above = count_true(logits > lowest[:, None])
    certain = (certain & (lowest > floors)) | (floors == -np.inf)
    return Nuclei(lowest, kept - num_above, masses[each, kept - 1]), certain


def _prefix_masses(weights: Float32Array) -> npt.NDArray[np.float64]:
    """[n, width]: of each weight the sum up to it; numpy's takes three times as long."""
    return torch.from_numpy(weights).cumsum(dim=1, dtype=torch.float64).numpy()
