"""The draft methods by the names under which a configuration asks for them."""

from __future__ import annotations

from outrider.configs.schema import Config
from outrider.workers.drafting.eagle3 import Eagle3Method
from outrider.workers.drafting.medusa import MedusaMethod
from outrider.workers.drafting.method import DraftMethod
from outrider.workers.drafting.model import ModelMethod
from outrider.workers.drafting.mtp import MtpMethod
from outrider.workers.drafting.ngram import NgramMethod
from outrider.workers.drafting.parallel import ParallelMethod
from outrider.workers.sequences.hidden import all_layers
from outrider.workers.weights.config import ModelConfig

METHODS: dict[str, type[DraftMethod]] = {
    method.name: method
    for method in (NgramMethod, ModelMethod, MedusaMethod, Eagle3Method, MtpMethod, ParallelMethod)
}


def layers_needed(config: Config, target: ModelConfig) -> tuple[int, ...]:
    """The layers of the target of which the configured methods read hidden rows, see `HiddenNeeds`."""
    return all_layers(METHODS[name].needs_of(config, target) for name in config.draft.methods)
