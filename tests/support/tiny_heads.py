"""Draft heads with random weights for tiny targets, and the draft methods that serve them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.draft_heads.convolutions import NO_CONVOLUTION, ConvolutionShape
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, Eagle3Shape
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.draft_heads.mtp import MtpDrafter, MtpShape, default_layer
from outrider.workers.draft_heads.pairs import NO_PAIR, MarkovTerm, PairShape
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter, ParallelShape
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.eagle3 import Eagle3Method
from outrider.workers.drafting.feature_levels import FeatureMethod
from outrider.workers.drafting.levels import LevelLimits
from outrider.workers.drafting.medusa import MedusaMethod
from outrider.workers.drafting.mtp import MtpMethod
from outrider.workers.drafting.parallel import ParallelMethod
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.draft_heads import for_serving, vocabulary_of
from outrider.workers.model.embedding import MatrixEmbedding
from outrider.workers.model.feature_drafter import CachedDrafter
from outrider.workers.model.parallel_drafter import CachedParallelDrafter
from outrider.workers.model.shard import ShardPlan
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig, Rope
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD

Method = TypeVar("Method", bound=FeatureMethod)

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


def eagle3_drafter(
    target: WeightSource,
    taps: tuple[int, ...],
    num_ids: int = 0,
    rank: int = 0,
    norm_before_residual: bool = False,
    head_dim: int = 16,
) -> Eagle3Drafter:
    """A drafter that adds noise to the last tap. num_ids, rank: of its LM head; 0: those of the target's."""
    config = target.config
    hidden_size, vocab_size = config.hidden_size, config.vocab_size
    lm_head = LmHeadShape(hidden_size, num_ids or vocab_size, rank or hidden_size)
    shape = Eagle3Shape(
        hidden_size=hidden_size,
        target_hidden_size=hidden_size,
        vocab_size=vocab_size,
        taps=taps,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        rope=Rope(),
        max_context=4096,
        norm_before_residual=norm_before_residual,
        lm_head=lm_head,
    )
    torch.manual_seed(1)
    ids = torch.randperm(vocab_size)[: lm_head.num_ids].sort().values
    drafter = Eagle3Drafter(shape, ids)
    drafter.fc.weight.data *= 0.1
    drafter.fc.weight.data[:, -hidden_size:] += torch.eye(hidden_size)
    if not lm_head.is_low_rank:
        drafter.lm_head.weight.data.copy_(read(target, HEAD)[ids])
    return drafter.requires_grad_(False)


def eagle3_method(
    slots: DraftedSlots,
    estimator: AcceptanceEstimator,
    target: WeightSource,
    drafter: Eagle3Drafter,
    num_pages: int = 512,
    page_size: int = 16,
    packed: bool = True,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    kernels: KernelSelection = REFERENCES,
) -> Eagle3Method:
    """The method as it is built for a tiny target. The drafter itself stays as it is."""
    where = (device, dtype, kernels)
    return _over_pages(Eagle3Method, slots, estimator, target, drafter, num_pages, page_size, packed, *where)


def mtp_drafter(target: WeightSource, num_ids: int = 0, rank: int = 0) -> MtpDrafter:
    """A head whose input is the token, with a little of the feature, and whose block adds little. num_ids, rank: of
    its LM head; 0: those of the target's."""
    config = target.config
    hidden_size, vocab_size = config.hidden_size, config.vocab_size
    lm_head = LmHeadShape(hidden_size, num_ids or vocab_size, rank or hidden_size)
    torch.manual_seed(1)
    ids = torch.randperm(vocab_size)[: lm_head.num_ids].sort().values
    drafter = MtpDrafter(MtpShape(config, default_layer(config), lm_head), ids)
    drafter.eh_proj.weight.data *= 0.3
    drafter.eh_proj.weight.data[:, :hidden_size] += torch.eye(hidden_size)
    drafter.block.self_attn.o_proj.weight.data *= 0.5
    if not lm_head.is_low_rank:
        drafter.lm_head.weight.data.copy_(read(target, HEAD)[ids])
    drafter.take_target(read(target, FINAL_NORM), None)
    return drafter.requires_grad_(False)


def mtp_method(
    slots: DraftedSlots,
    estimator: AcceptanceEstimator,
    target: WeightSource,
    drafter: MtpDrafter,
    num_pages: int = 512,
    page_size: int = 16,
) -> MtpMethod:
    """The method as it is built for a tiny target, in float32 on the CPU. The head itself stays as it is."""
    return _over_pages(MtpMethod, slots, estimator, target, drafter, num_pages, page_size, packed=True)


def _over_pages(
    method: type[Method],
    slots: DraftedSlots,
    estimator: AcceptanceEstimator,
    target: WeightSource,
    drafter: Eagle3Drafter | MtpDrafter,
    num_pages: int,
    page_size: int,
    packed: bool,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    kernels: KernelSelection = REFERENCES,
) -> Method:
    config, own = target.config, drafter.model
    vocabulary = vocabulary_of(drafter.lm_head.ids, config.vocab_size)
    rows = read(target, EMBEDDING).to(device, dtype)
    embedding = MatrixEmbedding(rows, VocabularyRange(0, config.vocab_size))
    moved = deepcopy(drafter)
    if device != CPU:  # a pretended GPU has no parameters, but tensors
        for part in moved.modules():
            for own_tensors in (part._parameters, part._buffers):
                own_tensors.update(
                    {
                        name: value.to(device, dtype)
                        for name, value in own_tensors.items()
                        if value is not None
                    }
                )
        moved.to = lambda *_: moved  # type: ignore[assignment, method-assign]
    served = for_serving(moved, config.vocab_size, dtype, device, packed)
    cache = PagedCache(own, ShardPlan(own, 0, 1), num_pages, page_size, dtype, device)
    return method(
        slots=slots,
        estimator=estimator,
        taps=drafter.shape.taps,
        drafter=CachedDrafter(served, embedding, cache, kernels),
        pool=PagePool(num_pages, page_size, prefix_sharing=True),
        sampler=Sampler(len(vocabulary), vocabulary, SoloCommunicator(), kernels),
        limits=LevelLimits(max_children=3, rows_per_sequence=4, max_rows=16, prefill_chunk=64),
        tracer=Tracer(method.name, False),
    )


def building_medusa(
    target: WeightSource,
) -> Callable[[DraftedSlots, AcceptanceEstimator, ModelConfig], MedusaMethod]:
    """For `LocalEngine`."""
    return lambda slots, estimator, _: medusa_method(slots, estimator, target, medusa_heads(target))


def building_eagle3(
    target: WeightSource, drafter: Eagle3Drafter, num_pages: int = 512
) -> Callable[[DraftedSlots, AcceptanceEstimator, ModelConfig], Eagle3Method]:
    """For `LocalEngine`."""
    return lambda slots, estimator, _: eagle3_method(slots, estimator, target, drafter, num_pages)


def building_mtp(
    target: WeightSource, drafter: MtpDrafter, num_pages: int = 512, page_size: int = 16
) -> Callable[[DraftedSlots, AcceptanceEstimator, ModelConfig], MtpMethod]:
    """For `LocalEngine`."""
    return lambda slots, estimator, _: mtp_method(slots, estimator, target, drafter, num_pages, page_size)


def parallel_drafter(
    target: WeightSource,
    taps: tuple[int, ...],
    layers: tuple[BlockLayer, ...] = (BlockLayer(is_causal=True),) * 2,
    first_slot: int = 0,
    block_size: int = 5,
    pair: PairShape = NO_PAIR,
    convolution: ConvolutionShape = NO_CONVOLUTION,
    num_ids: int = 0,
) -> ParallelDrafter:
    """A drafter with random weights, whose slots stay near the embedding that they read: what a tiny target says is
    mostly up to the last token, and so is what a Markov term of the target's width says here. num_ids: of its LM
    head, 0: the target's."""
    config = target.config
    hidden_size, vocab_size = config.hidden_size, config.vocab_size
    shape = ParallelShape(
        hidden_size=hidden_size,
        target_hidden_size=hidden_size,
        vocab_size=vocab_size,
        taps=taps,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        rope=Rope(),
        max_context=4096,
        layers=layers,
        block_size=block_size,
        first_slot=first_slot,
        num_levels=block_size - first_slot,
        mask_token_id=vocab_size - 1,
        lm_head=LmHeadShape(hidden_size, num_ids or vocab_size, hidden_size),
        pair=pair,
        confidence="none",
        convolution=convolution,
    )
    torch.manual_seed(1)
    ids = torch.randperm(vocab_size)[: shape.lm_head.num_ids].sort().values
    drafter = ParallelDrafter(shape, ids)
    drafter.lm_head.weight.data.copy_(read(target, HEAD)[ids])
    for name, weight in drafter.named_parameters():
        if name.startswith("pair.") or "_conv." in name:
            weight.data += (0.3 if "_conv." in name else 1.0) * torch.randn(weight.shape)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data *= 0.3
    if pair.kind in ("markov", "gated") and pair.rank == hidden_size:
        assert isinstance(drafter.pair, MarkovTerm)
        said = F.rms_norm(read(target, EMBEDDING), (hidden_size,))
        drafter.pair.markov_w1.weight.data.copy_(2.0 * said)
        drafter.pair.markov_w2.weight.data.copy_(read(target, HEAD)[ids])
    return drafter.requires_grad_(False)


def parallel_method(
    slots: DraftedSlots,
    estimator: AcceptanceEstimator,
    target: WeightSource,
    drafter: ParallelDrafter,
    num_pages: int = 512,
    page_size: int = 16,
    packed: bool = True,
) -> ParallelMethod:
    """The method as it is built for a tiny target, in float32 on the CPU. The drafter itself stays as it is."""
    config, own = target.config, drafter.shape.model
    vocabulary = vocabulary_of(drafter.lm_head.ids, config.vocab_size)
    embedding = MatrixEmbedding(read(target, EMBEDDING), VocabularyRange(0, config.vocab_size))
    served = for_serving(deepcopy(drafter), config.vocab_size, torch.float32, CPU, packed)
    cache = PagedCache(own, ShardPlan(own, 0, 1), num_pages, page_size, torch.float32, CPU)
    return ParallelMethod(
        slots=slots,
        estimator=estimator,
        drafter=CachedParallelDrafter(served, embedding, cache),
        pool=PagePool(num_pages, page_size, prefix_sharing=True),
        sampler=Sampler(len(vocabulary), vocabulary, SoloCommunicator()),
        limits=LevelLimits(max_children=3, rows_per_sequence=4, max_rows=16, prefill_chunk=64),
        num_nodes=12,
        tracer=Tracer("parallel", False),
    )


def building_parallel(
    target: WeightSource, drafter: ParallelDrafter, num_pages: int = 512
) -> Callable[[DraftedSlots, AcceptanceEstimator, ModelConfig], ParallelMethod]:
    """For `LocalEngine`."""
    return lambda slots, estimator, _: parallel_method(slots, estimator, target, drafter, num_pages)
