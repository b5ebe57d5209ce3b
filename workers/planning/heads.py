"""Bytes of trained draft heads, as far as they are on this machine."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from outrider.configs.schema import Config
from outrider.workers.setup import torch_dtype
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fields import read_json
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import SHIPPED_PREFIX, resolve_head
from outrider.workers.weights.safetensors_files import SafetensorsFiles

_TRAINED = ("medusa", "eagle3", "mtp", "parallel")
_STEPPING = ("eagle3", "mtp")
_WITH_A_CACHE = ("eagle3", "mtp", "parallel")  # which also have the target's embedding


@dataclass(frozen=True)
class Heads:
    """Of the draft methods of a configuration.

    Attributes:
        num_bytes: of the heads that are here, in the drafter's dtype, and of what they share with the target.
        num_caches: methods that have a cache of `draft.kv_cache_bytes`.
        stepping: of those whose steps are CUDA graphs and whose heads are here: the drafter as a model of one layer,
            with a vocabulary of the tokens that it has logits of.
        unknown: the heads that are not here, one line each.
    """

    num_bytes: int
    num_caches: int
    stepping: tuple[ModelConfig, ...]
    unknown: tuple[str, ...]


def heads_of(config: Config, target: ModelConfig) -> Heads:
    """Of all trained methods of `draft.methods`."""
    size = torch_dtype(config.draft.dtype).itemsize
    num_bytes, stepping, unknown = 0, [], []
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
            if method in _STEPPING:
                stepping.append(_stepping_model(method, folder, target))
    num_caches = sum(method in _WITH_A_CACHE for method in methods)
    return Heads(num_bytes, num_caches, tuple(stepping), tuple(unknown))


def num_taps_of(config: Config, target: ModelConfig) -> int:
    """Layers of the target whose rows the draft methods read; 0 where one's heads are not here."""
    methods = [method for method in config.draft.methods if method in _TRAINED]
    if not methods or any(_folder(config, method) is None for method in methods):
        return 0
    from outrider.workers.drafting.registry import layers_needed  # takes a second to import

    return len(layers_needed(config, target))


def _stepping_model(method: str, folder: Path, target: ModelConfig) -> ModelConfig:
    """See `Heads.stepping`."""
    # With torch's modules, which take a second to import.
    from outrider.workers.draft_heads.layouts.eagle3 import read_eagle3_config
    from outrider.workers.draft_heads.layouts.mtp import read_mtp_config

    described = read_json(folder / "config.json")
    if method == "eagle3":
        eagle3 = read_eagle3_config(described, target.num_layers).shape
        return replace(eagle3.model, vocab_size=eagle3.lm_head.num_ids)
    mtp = read_mtp_config(described).shape
    return replace(mtp.model, vocab_size=mtp.lm_head.num_ids)


def _folder(config: Config, method: str) -> Path | None:
    model = getattr(config.draft, method).model
    if model.startswith(SHIPPED_PREFIX):
        return resolve_head(model, silent, f"draft.{method}.model")
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else None
