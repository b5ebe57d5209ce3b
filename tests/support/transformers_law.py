"""The law as transformers' own logits processors make it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from outrider.workers.sequences.params import SamplingParams


def transformers_law(params: SamplingParams, input_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities as transformers' generate would sample from, in its order of processors.

    logits: float32 [1, vocab_size]; the result is [vocab_size].
    """
    processors = LogitsProcessorList()
    if params.logit_bias:
        bias: list[Any] = [[[token], value] for token, value in params.logit_bias]
        processors.append(SequenceBiasLogitsProcessor(bias))
    processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    return torch.log_softmax(processors(torch.tensor([input_ids]), logits.clone()), dim=-1)[0]
