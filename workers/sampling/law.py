"""The law p̃ a request asks for, as functions of few logits.

Edits (logit bias, repetition, presence and frequency penalties) touch the ids they name and are made in
place. Truncation (top-k, top-p, min-p) keeps a prefix of the tokens in order of falling logits, so it is
decided from a sorted list of the likeliest. Same order and same rules as transformers' LogitsProcessors;
presence and frequency penalties are those of the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Float32Array
from outrider.workers.sampling.context import RowContext
from outrider.workers.sequences.params import SamplingParams


@dataclass(frozen=True)
class Edits:
    """What `edit_rows` overwrote: logits float32 [num_edited] at (rows, columns), int64 [num_edited]."""

    rows: torch.Tensor
    columns: torch.Tensor
    logits: torch.Tensor

    def undo(self, logits: torch.Tensor) -> None:
        if len(self.rows):
            logits[self.rows, self.columns] = self.logits


def edit_rows(logits: torch.Tensor, contexts: Sequence[RowContext], vocab_offset: int) -> Edits:
    """Apply logit bias and penalties in place, where the logits are: only what is edited is brought to the host.

    Args:
        logits: float32 [num_rows, shard_size]; column 0 is token `vocab_offset`.
        contexts: what each row is sampled for.
    """
    edited_rows = [i for i, context in enumerate(contexts) if context.params.edits_logits]
    named = [_TokensOfRow(contexts[i], vocab_offset, logits.shape[1]) for i in edited_rows]
    lengths = [len(tokens.local_ids) for tokens in named]
    if not any(lengths):
        nothing = torch.empty(0, dtype=torch.int64)
        return Edits(nothing, nothing, torch.empty(0))
    rows = torch.from_numpy(np.repeat(edited_rows, lengths)).to(logits.device)
    columns = torch.from_numpy(np.concatenate([t.local_ids for t in named]) - vocab_offset).to(logits.device)
    original = logits[rows, columns]
    edited = original.cpu().numpy().copy()
    for tokens, end in zip(named, np.cumsum(lengths), strict=True):
        tokens.edit(edited[end - len(tokens.local_ids) : end])
    logits[rows, columns] = torch.from_numpy(edited).to(logits.device)
    return Edits(rows, columns, original)


class _TokensOfRow:
    """The tokens of one shard that a row's parameters edit: those of the context first, then others with a bias."""

    def __init__(self, context: RowContext, first: int, size: int) -> None:
        self._params = params = context.params
        ids = counts = np.zeros(0, dtype=np.int64)
        if params.uses_context:
            ids, counts = context.penalties.with_path(context.path_tokens)
        bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        all_ids = np.concatenate([ids, bias_ids[~np.isin(bias_ids, ids)]])
        local = (all_ids >= first) & (all_ids < first + size)
        self.local_ids = all_ids[local]
        self._counts = counts[local[: len(ids)]]

    def edit(self, logits: Float32Array) -> None:
        """`logits` of `local_ids`, in place."""
        bias = dict(self._params.logit_bias)
        if bias:
            logits += np.array([bias.get(token, 0.0) for token in self.local_ids.tolist()], dtype=np.float32)
        if self._params.uses_context:
            penalise(logits[: len(self._counts)], self._counts, self._params)


def penalise(logits: Float32Array, counts: npt.NDArray[np.int64], params: SamplingParams) -> None:
    """Repetition, then presence and frequency penalties, in place, on the logits of tokens seen so far.

    `counts` says how often the output has each: 0 for a token that only the prompt has.
    """
    factor = np.float32(params.repetition_penalty)
    np.copyto(logits, np.where(logits < 0, logits * factor, logits / factor))
    logits -= np.float32(params.presence_penalty) * (counts > 0)
    logits -= np.float32(params.frequency_penalty) * counts.astype(np.float32)


def num_kept(logits: Float32Array, params: SamplingParams, total: float) -> int:
    """How many of the likeliest tokens top-k, top-p and min-p leave.

    Args:
        logits: float32 [num_candidates], the largest of the vocabulary, largest first.
        params: temperature > 0.
        total: sum over the vocabulary of exp((logit - largest logit) / temperature).
    """
    kept = num_in_top_k(logits, params.top_k)
    x = (logits[:kept] - logits[0]).astype(np.float64) / np.float32(params.temperature)
    if params.top_p < 1.0:
        weights = np.exp(x)
        if params.top_k > 0:
            total = float(weights.sum())
        mass_before = np.cumsum(weights) - weights
        kept = max(1, int(np.count_nonzero(mass_before < params.top_p * total)))
    if params.min_p > 0.0:
        kept = min(kept, int(np.count_nonzero(x >= np.log(params.min_p))))
    return kept


def num_in_top_k(logits: Float32Array, top_k: int) -> int:
    """How many of `logits` (largest first) reach the k-th largest."""
    if top_k == 0 or top_k >= len(logits):
        return len(logits)
    return int(np.count_nonzero(logits >= logits[top_k - 1]))
