"""The law p̃ a request asks for, as functions of few logits.

Edits (logit bias, repetition, presence and frequency penalties) touch the ids they name and are made in
place. Truncation (top-k, top-p, min-p) keeps a prefix of the tokens in order of falling logits, so it is
decided from a sorted list of the likeliest. Same order and same rules as transformers' LogitsProcessors;
presence and frequency penalties are those of the OpenAI API.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.noise import Float32Array, Int64Array
from outrider.workers.sampling.context import RowContext
from outrider.workers.sampling.params import SamplingParams


@dataclass(frozen=True)
class Edit:
    """What `edit_row` overwrote."""

    columns: torch.Tensor  # int64 [num_edited]
    logits: torch.Tensor  # float32 [num_edited], as they were

    def undo(self, row: torch.Tensor) -> None:
        row[self.columns] = self.logits


def edit_row(row: torch.Tensor, context: RowContext, vocab_offset: int) -> Edit:
    """Apply logit bias and penalties in place to `row`, float32 [shard_size]; column 0 is `vocab_offset`."""
    params = context.params
    ids, counts = context.penalties.with_path(context.path_tokens) if params.uses_context else _NOTHING
    bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
    all_ids = np.concatenate([ids, bias_ids[~np.isin(bias_ids, ids)]])
    local = (all_ids >= vocab_offset) & (all_ids < vocab_offset + row.shape[0])
    columns = torch.from_numpy(all_ids[local] - vocab_offset)
    original = row[columns]
    logits = original.numpy().copy()
    bias = dict(params.logit_bias)
    if bias:
        logits += np.array([bias.get(token, 0.0) for token in all_ids[local].tolist()], dtype=np.float32)
    if params.uses_context:
        seen = local[: len(ids)]
        edited = logits[: np.count_nonzero(seen)]  # a view: context ids come first
        penalise(edited, counts[seen], params)
    row[columns] = torch.from_numpy(logits)
    return Edit(columns, original)


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


_NOTHING: tuple[Int64Array, Int64Array] = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
