"""Draft heads with random weights for tiny targets, and the draft methods that serve them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.medusa import MedusaMethod
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.draft_heads import for_serving
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import HEAD

ALL = slice(None)
CPU = torch.device("cpu")
NOT_COUNTED = np.zeros((0, 0))


def read(target: WeightSource, name: str) -> torch.Tensor:
    """A whole tensor in float32."""
    return target.read(name, ALL, ALL, torch.float32)


def medusa_heads(target: WeightSource, num_heads: int = 3) -> MedusaHeads:
    """Heads that begin as copies of the target's own, and are thrown off a little."""
    config = target.config
    lm_head = LmHeadShape(config.hidden_size, config.vocab_size, config.hidden_size)
    shape = MedusaShape(config.hidden_size, config.vocab_size, num_heads, 1, lm_head, False)
    torch.manual_seed(0)
    heads = MedusaHeads(shape, torch.arange(config.vocab_size))
    for block, own in zip(heads.blocks, heads.lm_heads, strict=True):
        torch.nn.init.normal_(block[0].linear.weight, std=0.3 * config.hidden_size**-0.5)
        own.weight.data.copy_(read(target, HEAD))
    return heads


def sampler_of(vocab_size: int) -> Sampler:
    return Sampler(vocab_size, VocabularyRange(0, vocab_size), SoloCommunicator())


def medusa_method(
    slots: DraftedSlots,
    estimator: AcceptanceEstimator,
    target: WeightSource,
    heads: MedusaHeads,
    accuracies: np.ndarray = NOT_COUNTED,
    packed: bool = True,
) -> MedusaMethod:
    """The method as it is built for a tiny target, in float32 on the CPU."""
    config = target.config
    return MedusaMethod(
        slots=slots,
        estimator=estimator,
        target=config,
        heads=for_serving(heads, config.vocab_size, torch.float32, CPU, packed),
        final_norm=read(target, "model.norm.weight"),
        accuracies=accuracies,
        sampler=sampler_of(config.vocab_size),
        max_children=3,
        num_nodes=12,
        tracer=Tracer("medusa", False),
    )


def building_medusa(
    target: WeightSource,
) -> Callable[[DraftedSlots, AcceptanceEstimator, ModelConfig], MedusaMethod]:
    """For `LocalEngine`."""
    return lambda slots, estimator, _: medusa_method(slots, estimator, target, medusa_heads(target))
