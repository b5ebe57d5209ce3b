"""Draft method `mtp` (DeepSeek-V3, arXiv 2412.19437): a block of the target's own kind on the target's last hidden
row, fed back on itself, see `feature_levels`."""

from __future__ import annotations

from typing import Self

import torch

from outrider.configs.schema import Config
from outrider.workers.draft_heads.checkpoint import read_mtp
from outrider.workers.draft_heads.layouts.mtp import read_mtp_config
from outrider.workers.drafting.feature_levels import FeatureMethod
from outrider.workers.drafting.heads import check_fingerprint, check_target, read_for
from outrider.workers.drafting.method import MethodContext
from outrider.workers.model.draft_heads import for_serving, vocabulary_of
from outrider.workers.model.embedding import embedding_of
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.setup import load_target_tensors, torch_dtype
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fields import read_json
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import resolve_head
from outrider.workers.weights.source import head_name
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD

_ALL = slice(None)
_FIELD = "draft.mtp.model"


class MtpMethod(FeatureMethod):
    """Grows trees with a head for multi-token prediction."""

    name = "mtp"

    @classmethod
    def build(cls, context: MethodContext) -> Self:
        """Load `draft.mtp.model` and what it shares with the target, and lay out its cache."""
        config, target, device = context.config, context.target, context.device
        folder = resolve_head(config.draft.mtp.model, context.progress, _FIELD)
        drafter, description = read_for(_FIELD, lambda: read_mtp(folder))
        made_for = drafter.shape.target
        check_target(_FIELD, description, made_for.hidden_size, made_for.vocab_size, target)
        shared = [EMBEDDING, FINAL_NORM, *([HEAD] if drafter.shares_lm_head else [])]
        source = load_target_tensors(config, shared, context.progress)
        check_fingerprint(_FIELD, description, source)
        drafter.take_target(
            source.read(FINAL_NORM, _ALL, _ALL, torch.float32),
            source.read(head_name(source), _ALL, _ALL, torch.float32) if drafter.shares_lm_head else None,
        )
        dtype = torch_dtype(config.draft.dtype)
        layout = config.draft.packed_weights, config.draft.int8_heads
        served = for_serving(drafter, target.vocab_size, dtype, device, *layout)
        vocabulary = vocabulary_of(served.lm_head.ids, target.vocab_size)
        embedding = embedding_of(source, dtype, device)
        return cls.over_pages(context, drafter.shape.taps, served, embedding, vocabulary)

    @classmethod
    def needs_of(cls, config: Config, target: ModelConfig) -> HiddenNeeds:
        """What leaves the target's last layer; the checkpoint's weights are not looked at."""
        folder = resolve_head(config.draft.mtp.model, silent, _FIELD, description_only=True)
        taps = read_for(_FIELD, lambda: read_mtp_config(read_json(folder / "config.json")).shape.taps)
        return HiddenNeeds(taps, of_context=True)
