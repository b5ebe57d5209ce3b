"""The sampler's law written out over the whole vocabulary, with nothing clever in it."""

from __future__ import annotations

from collections import Counter

import numpy as np

from outrider.kernels.noise import gumbel_from_hash, hash_ids, noise_key
from outrider.workers.sequences.params import SamplingParams


def edited_logits(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]
) -> np.ndarray:
    """Logit bias and penalties: float32 [vocab_size] to the same."""
    edited = logits.copy()
    for token, value in params.logit_bias:
        edited[token] += np.float32(value)
    for token in set(prompt) | set(output):
        value, penalty = edited[token], np.float32(params.repetition_penalty)
        edited[token] = value * penalty if value < 0 else value / penalty
    for token, count in Counter(output).items():
        edited[token] -= np.float32(params.presence_penalty)
        edited[token] -= np.float32(params.frequency_penalty) * np.float32(count)
    return edited


def kept_tokens(edited: np.ndarray, params: SamplingParams) -> list[int]:
    """What top-k, top-p and min-p leave, by falling logit, then by rising id."""
    order = sorted(np.flatnonzero(edited > -np.inf).tolist(), key=lambda token: (-edited[token], token))
    if params.top_k > 0:
        kth = edited[order[min(params.top_k, len(order)) - 1]]
        order = [token for token in order if edited[token] >= kth]
    scaled = (edited[order].astype(np.float64) - edited[order[0]]) / np.float32(params.temperature)
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    before = np.cumsum(probabilities) - probabilities
    kept = [token for i, token in enumerate(order) if params.top_p == 1 or i == 0 or before[i] < params.top_p]
    if params.min_p > 0:
        kept = [token for i, token in enumerate(kept) if probabilities[i] >= params.min_p * probabilities[0]]
    return kept


def nucleus_is_a_matter_of_rounding(edited: np.ndarray, params: SamplingParams) -> bool:
    """Whether top-p or min-p meets a token so nearly that the order of a sum decides about it."""
    whole = SamplingParams(temperature=params.temperature, top_k=params.top_k)
    order = kept_tokens(edited, whole)
    scaled = (edited[order].astype(np.float64) - edited[order[0]]) / np.float32(params.temperature)
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    before = np.cumsum(probabilities) - probabilities
    nearest = np.abs(before - params.top_p).min() if params.top_p < 1 else 1.0
    if params.min_p > 0:
        nearest = min(nearest, np.abs(scaled - np.log(params.min_p)).min())
    return bool(nearest < 1e-6)


def processed_log_probs(edited: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The law p̃ as log-probabilities, float64 [vocab_size], -inf for removed tokens; temperature > 0."""
    kept = kept_tokens(edited, params)
    scaled = (edited[kept].astype(np.float64) - edited[kept[0]]) / np.float32(params.temperature)
    log_probs = np.full(len(edited), -np.inf)
    log_probs[kept] = scaled - np.log(np.exp(scaled).sum())
    return log_probs


@np.errstate(over="ignore")  # what leaves float32 downwards is as good as removed
def scores(edited: np.ndarray, params: SamplingParams, position: int) -> np.ndarray:
    """log p̃ + G up to a constant, float32 [vocab_size]; -inf for removed tokens."""
    if params.is_greedy:
        return edited
    noise = gumbel_from_hash(hash_ids(noise_key(params.seed, position), np.arange(len(edited))))
    result = np.full(len(edited), -np.inf, dtype=np.float32)
    kept = kept_tokens(edited, params)
    result[kept] = edited[kept] / np.float32(params.temperature) + noise[kept]
    return result


def raw_log_probs(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities under the model's own law, float64 [vocab_size]."""
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())
