"""From a configuration to loaded models, cache sizes, groups and links: what both workers do to get ready."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Literal

import torch

from outrider.configs.schema import Config
from outrider.kernels.selection import DEFAULT_MEMORY, ENTRIES, KernelSelection, select_kernels
from outrider.workers.link.communicator import Communicator, agreed
from outrider.workers.model.cache import bytes_per_page
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import open_source, read_config, resolve, resolve_description
from outrider.workers.weights.source import WeightSource

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The configuration's dtype as torch's."""
    return _DTYPES[name]


def torch_device(name: str) -> torch.device:
    """`auto` is the GPU that this process was given, or the CPU where it was given none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be auto or cpu on a machine without a usable GPU, got 'cuda'")
    return torch.device(name)


def kernels_for(
    config: Config, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> KernelSelection:
    """Which CUDA kernels a model uses: none on a CPU, else by `target.attention` and the GPU's self-test."""
    return select_kernels(config.target.attention, device, dtype, model.head_dim, DEFAULT_MEMORY)


def agreed_kernels(mine: KernelSelection, communicator: Communicator) -> KernelSelection:
    """The kernels that every rank of a group may use; one exchange.

    What only some may use, none does: a kernel rounds otherwise than its reference, and only ranks with the same
    kernels can replay the same CUDA graphs.
    """
    common = KernelSelection(*agreed(communicator, astuple(mine)))
    dropped = [name for name in ENTRIES if getattr(mine, name) and not getattr(common, name)]
    if dropped:
        warnings.warn(f"{', '.join(dropped)} will not be used: not every rank can use them", stacklevel=2)
    return common


def load_model(config: Config, role: Literal["target", "draft"], progress: Progress) -> WeightSource:
    """Find (or download) the checkpoint of the target or the drafter and open it.

    Raises:
        ValueError: names `target.model` or `draft.model` and what was tried.
    """
    model = config.target.model if role == "target" else config.draft.model
    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    return open_source(resolve(model, cache_dir, progress, f"{role}.model"))


def read_model_config(config: Config, role: Literal["target", "draft"], progress: Progress) -> ModelConfig:
    """What the target or the drafter is, for who does not hold its weights: they are not fetched.

    Raises:
        ValueError: names `target.model` or `draft.model` and what was tried.
    """
    model = config.target.model if role == "target" else config.draft.model
    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    return read_config(resolve_description(model, cache_dir, progress, f"{role}.model"))


def num_target_pages(config: Config, model: ModelConfig) -> int:
    """KV pages of the target: the same on every rank, so the rank with the most KV heads decides.

    Raises:
        ValueError: `target.kv_cache_bytes` does not hold one page.
    """
    target = config.target
    per_page = max(
        bytes_per_page(
            model, ShardPlan(model, rank, target.tp_size), torch_dtype(target.dtype), target.page_size
        )
        for rank in range(target.tp_size)
    )
    return _num_pages("target", target.kv_cache_bytes, per_page)


def num_draft_pages(config: Config, model: ModelConfig) -> int:
    """KV pages of the draft model.

    Raises:
        ValueError: `draft.kv_cache_bytes` does not hold one page.
    """
    draft = config.draft
    per_page = bytes_per_page(
        model, ShardPlan(model, 0, 1), torch_dtype(draft.dtype), config.target.page_size
    )
    return _num_pages("draft", draft.kv_cache_bytes, per_page)


def max_sequence_tokens(config: Config, model: ModelConfig) -> int:
    """Longest sequence (prompt and output, tokens) that can be served: context limits and the whole KV cache."""
    rows = num_target_pages(config, model) * config.target.page_size
    return min(config.target.max_context, model.max_context, rows)


def _num_pages(role: str, kv_cache_bytes: int, bytes_per_page: int) -> int:
    if kv_cache_bytes < bytes_per_page:
        raise ValueError(
            f"{role}.kv_cache_bytes must be at least {bytes_per_page} (one page), got {kv_cache_bytes}"
        )
    return kv_cache_bytes // bytes_per_page


def counting(progress: Progress, total_bytes: int) -> Callable[[int], None]:
    """What a loader calls with the bytes it has read: reports them all together as `load`."""
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("load", min(done, total_bytes), total_bytes)

    return count
