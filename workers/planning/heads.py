"""Bytes of trained draft heads, as far as they are on this machine."""

import math
from dataclasses import dataclass
from pathlib import Path

from outrider.configs.schema import Config
from outrider.workers.setup import torch_dtype
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import SHIPPED_PREFIX, resolve_head
from outrider.workers.weights.safetensors_files import SafetensorsFiles

_TRAINED = ("medusa", "eagle3", "mtp", "parallel")
_WITH_A_CACHE = ("eagle3", "mtp", "parallel")  # which also have the target's embedding


@dataclass(frozen=True)
class Heads:
    """Of the draft methods of a configuration.

    Attributes:
        num_bytes: of the heads that are here, in the drafter's dtype, and of what they share with the target.
        num_caches: methods that have a cache of `draft.kv_cache_bytes`.
        unknown: the heads that are not here, one line each.
    """

    num_bytes: int
    num_caches: int
    unknown: tuple[str, ...]


def heads_of(config: Config, target: ModelConfig) -> Heads:
    """Of all trained methods of `draft.methods`."""
    size = torch_dtype(config.draft.dtype).itemsize
    num_bytes, unknown = 0, []
    methods = [method for method in config.draft.methods if method in _TRAINED]
    for method in methods:
        if method in _WITH_A_CACHE and config.draft.device != "cpu":
            num_bytes += target.vocab_size * target.hidden_size * size
        folder = _folder(config, method)
        if folder is None:
            unknown.append(f"the weights of draft.{method}.model, which are not on this machine")
        else:
            entries = SafetensorsFiles(sorted(folder.glob("*.safetensors"))).entries
            num_bytes += sum(math.prod(entry.shape) for entry in entries.values()) * size
    return Heads(num_bytes, sum(method in _WITH_A_CACHE for method in methods), tuple(unknown))


def num_taps_of(config: Config, target: ModelConfig) -> int:
    """Layers of the target whose rows the draft methods read; 0 where one's heads are not here."""
    methods = [method for method in config.draft.methods if method in _TRAINED]
    if not methods or any(_folder(config, method) is None for method in methods):
        return 0
    from outrider.workers.drafting.registry import layers_needed  # takes a second to import

    return len(layers_needed(config, target))


def _folder(config: Config, method: str) -> Path | None:
    model = getattr(config.draft, method).model
    if model.startswith(SHIPPED_PREFIX):
        return resolve_head(model, silent, f"draft.{method}.model")
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else None
