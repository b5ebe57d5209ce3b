"""Which part of the target's checkpoint a training needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outrider.configs.training import TrainingConfig
from outrider.workers.draft_heads.mtp import default_layer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import (
    ResolvedModel,
    open_source,
    open_tensors,
    read_config,
    resolve,
    resolve_description,
    resolve_tensors,
)
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD, tensor_shapes


def resolve_target(config: TrainingConfig, progress: Progress) -> ResolvedModel:
    """The target's checkpoint, downloaded if need be. Raises ValueError naming `target.model`."""
    return resolve(config.target.model, _cache_dir(config), progress, "target.model")


def open_target(config: TrainingConfig, progress: Progress) -> WeightSource:
    """What is read of the target by `config.method`, any but medusa2: all of it, or where its rows were kept, its
    embedding, its end and the layers that a drafter starts as. Raises ValueError naming `target.model`."""
    if config.texts.features != "kept":
        return open_source(resolve_target(config, progress))
    described = resolve_description(config.target.model, _cache_dir(config), progress, "target.model")
    target = read_config(described)
    layers = tuple(f"model.layers.{index}." for index in _start_layers(config, target))
    names = {
        EMBEDDING,
        FINAL_NORM,
        HEAD,
        *(name for name in tensor_shapes(target) if name.startswith(layers)),
    }
    found = resolve_tensors(config.target.model, names, _cache_dir(config), progress, "target.model")
    return open_tensors(found, names)


def _start_layers(config: TrainingConfig, target: ModelConfig) -> Sequence[int]:
    """The target's layers that a drafter's start as."""
    end = target.num_layers
    if config.method == "eagle3" and config.eagle3.start == "target_last_layer":
        return (end - 1,)
    if config.method == "mtp" and config.mtp.start == "target_last_layer":
        return (default_layer(target),)
    if config.method == "parallel" and config.parallel.start == "target_last_layers":
        return range(max(0, end - config.parallel.num_layers), end)
    return ()


def _cache_dir(config: TrainingConfig) -> Path:
    return Path(config.target.model_cache_dir).expanduser()
