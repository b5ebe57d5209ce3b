"""Draft method `eagle3` (arXiv 2503.01840): a layer on three of the target's hidden rows, see `feature_levels`."""

from __future__ import annotations

from typing import Self

from outrider.configs.schema import Config
from outrider.workers.draft_heads.checkpoint import read_eagle3
from outrider.workers.draft_heads.layouts.eagle3 import read_eagle3_config
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
from outrider.workers.weights.tensors import EMBEDDING

_FIELD = "draft.eagle3.model"


class Eagle3Method(FeatureMethod):
    """Grows trees with an EAGLE-3 drafter."""

    name = "eagle3"

    @classmethod
    def build(cls, context: MethodContext) -> Self:
        """Load `draft.eagle3.model` and the target's embedding, and lay out its cache."""
        config, target, device = context.config, context.target, context.device
        folder = resolve_head(config.draft.eagle3.model, context.progress, _FIELD)
        drafter, description = read_for(_FIELD, lambda: read_eagle3(folder, target.num_layers))
        shape = drafter.shape
        check_target(_FIELD, description, shape.target_hidden_size, shape.vocab_size, target)
        check_target(_FIELD, description, shape.hidden_size, shape.vocab_size, target)
        source = load_target_tensors(config, [EMBEDDING], context.progress)
        check_fingerprint(_FIELD, description, source)
        dtype = torch_dtype(config.draft.dtype)
        layout = config.draft.packed_weights, config.draft.int8_heads
        served = for_serving(drafter, shape.vocab_size, dtype, device, *layout)
        vocabulary = vocabulary_of(served.lm_head.ids, shape.vocab_size)
        embedding = embedding_of(source, dtype, device)
        return cls.over_pages(context, shape.taps, served, embedding, vocabulary)

    @classmethod
    def needs_of(cls, config: Config, target: ModelConfig) -> HiddenNeeds:
        """The taps that the checkpoint names; its weights are not looked at."""
        folder = resolve_head(config.draft.eagle3.model, silent, _FIELD, description_only=True)
        taps = read_for(
            _FIELD,
            lambda: read_eagle3_config(read_json(folder / "config.json"), target.num_layers).shape.taps,
        )
        return HiddenNeeds(taps, of_context=True)
