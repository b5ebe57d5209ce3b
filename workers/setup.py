"""From a configuration to loaded models, cache sizes, groups and links: what both workers do to get ready."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from outrider.configs.schema import Config
from outrider.kernels.selection import DEFAULT_MEMORY, ENTRIES, KernelSelection, select_kernels
from outrider.workers.capacity import cache_is_fp8, num_target_pages
from outrider.workers.link.communicator import Communicator, Role, agreed
from outrider.workers.model.cache import CacheScales, PagedCache
from outrider.workers.model.fp8_cache import Fp8PagedCache
from outrider.workers.model.linear import row_step
from outrider.workers.model.loader import ModelWeights
from outrider.workers.model.shard import ShardPlan, bytes_per_page
from outrider.workers.sampling.grammars import Grammars
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.integers import with_weights
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import (
    ResolvedModel,
    open_source,
    open_tensors,
    read_config,
    resolve,
    resolve_description,
    resolve_tensors,
    resolve_tokenizer,
)
from outrider.workers.weights.scaled import FP8
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.token_texts import TokenTexts, token_texts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The configuration's dtype as torch's."""
    return _DTYPES[name]


def with_draft_dtype(config: Config, device_type: str) -> Config:
    """The configuration with a `draft.dtype` of `auto` decided, for a drafter on "cpu" or "cuda"."""
    draft = config.draft
    if draft.dtype != "auto":
        return config
    # Ranks may be on machines that differ, and have to agree.
    dtype = "bfloat16" if draft.tp_size > 1 else quick_dtype(device_type)
    return replace(config, draft=replace(draft, dtype=dtype))


def quick_dtype(device_type: str) -> Literal["bfloat16", "float32"]:
    """What "cpu", this one, or "cuda" computes in, where nobody says: float32 on a CPU that has no instructions for
    bfloat16, of which products of many rows take 4 to 20 times as long there."""
    return "bfloat16" if device_type != "cpu" or _cpu_multiplies_bfloat16() else "float32"


def _cpu_multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return True  # what serves models on others has it
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def torch_device(role: Literal["target", "draft"], name: str, gpus: Sequence[int]) -> torch.device:
    """Where a process computes.

    Args:
        name: `target.device` or `draft.device`; `auto` is the GPU that this process was given, or the CPU where it
            was given none. What else the process sees (Ray does not hide GPUs that it has not given) is not ours.
        gpus: CUDA ordinals of the GPUs that this process was given.

    Raises:
        ValueError: a GPU is asked for that was not given, or torch cannot use the one that was.
    """
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        key = f"cluster.num_gpus_per_{role}"
        raise ValueError(
            f"{role}.device must be auto or cpu where a process was given no GPU ({key}), got {name!r}"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"{role}.device must be cpu where torch ({torch.__version__}) can use no GPU, got {name!r}"
        )
    return torch.device("cuda", gpus[0])


def use_device(device: torch.device) -> None:
    """Makes a GPU the current one of this thread: streams, events, graphs and NCCL's groups are made on that. Every
    thread of a worker has a current GPU of its own, which is the first one at its start."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def require_memory(device: torch.device, num_bytes: int, rank: int) -> None:
    """Before a rank of the target reads weights that would not fit.

    Args:
        num_bytes: of its weights and its KV cache.

    Raises:
        ValueError: the GPU has less.
    """
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        raise ValueError(
            f"target.kv_cache_bytes and the weights of rank {rank} take {num_bytes / 2**30:.1f} GiB, {device} has "
            f"{free / 2**30:.1f} GiB free; `outrider plan` says what would fit"
        )


def transport_for(all_reduce: str, device: torch.device, tp_size: int, role: Role = "target") -> str:
    """`target.all_reduce` or `draft.all_reduce` as `join_group` takes it: `auto` becomes `nccl` on GPUs.

    Raises:
        ValueError: ranks cannot sum in this way what is on their devices.
    """
    on_gpu = device.type == "cuda"
    if all_reduce == "auto":
        return "nccl" if on_gpu else "auto"
    if tp_size > 1 and all_reduce == ("shm" if on_gpu else "nccl"):
        allowed, where = ("nccl or gloo", "GPUs") if on_gpu else ("gloo or shm", "the CPU")
        raise ValueError(
            f"{role}.all_reduce must be auto, {allowed} where ranks compute on {where}, got {all_reduce!r}"
        )
    return all_reduce


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
        ValueError: names `target.model` or `draft.model` and what was tried, or `weights` beside it.
    """
    described = config.target if role == "target" else config.draft
    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    source = open_source(resolve(described.model, cache_dir, progress, f"{role}.model"))
    return with_weights(source, described.weights, role)


def load_target_tensors(config: Config, names: Collection[str], progress: Progress) -> WeightSource:
    """Some of the target's tensors, for who holds none of its weights: files without them are not fetched.

    Raises:
        ValueError: names `target.model` and what was tried.
    """
    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    found = resolve_tensors(config.target.model, names, cache_dir, progress, "target.model")
    return open_tensors(found, names)


def read_model_config(config: Config, role: Literal["target", "draft"], progress: Progress) -> ModelConfig:
    """What the target or the drafter is, for who does not hold its weights: they are not fetched.

    Raises:
        ValueError: names `target.model` or `draft.model` and what was tried.
    """
    model = config.target.model if role == "target" else config.draft.model
    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    return read_config(resolve_description(model, cache_dir, progress, f"{role}.model"))


def target_grammars(config: Config, model: ModelConfig, progress: Progress) -> Grammars:
    """Over the target's tokens; what they say is read when the first grammar comes.

    Args:
        model: the target.

    Raises:
        ValueError: names `target.model` or `target.tokenizer` and what was tried.
    """
    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    if config.target.tokenizer:
        speaks = resolve_tokenizer(config.target.tokenizer, cache_dir, progress, "target.tokenizer")
    else:
        speaks = resolve_description(config.target.model, cache_dir, progress, "target.model")
    return Grammars(model.vocab_size, partial(_read_texts, model, speaks))


def _read_texts(model: ModelConfig, speaks: ResolvedModel) -> TokenTexts:
    from outrider.workers.weights.tokenizer import end_token_ids, load_tokenizer

    tokenizer = load_tokenizer(speaks)
    return token_texts(tokenizer, model.vocab_size, end_token_ids(model, tokenizer, speaks))


def target_row_step(config: Config) -> int:
    """Multiples of rows that the target computes, its processors taken to be like this process's."""
    target = config.target
    is_on_cpu = target.device == "cpu" or (target.device == "auto" and not config.cluster.num_gpus_per_target)
    packs = target.packed_weights and target.weights == "auto"
    return row_step(torch_dtype(target.dtype)) if is_on_cpu and packs else 1


def cache_dtype(config: Config, model: ModelConfig) -> torch.dtype:
    """Of the target's KV cache."""
    return FP8 if cache_is_fp8(config, model) else torch_dtype(config.target.dtype)


def kernels_with_cache(kernels: KernelSelection, cache: torch.dtype) -> KernelSelection:
    """Those that take the rows of a cache."""
    return kernels.of_fp8_cache() if cache == FP8 else kernels


def target_cache(
    config: Config, weights: ModelWeights, scales: Sequence[CacheScales], kernels: KernelSelection
) -> PagedCache:
    """The KV cache of a rank of the target; `scales` of each layer, should it be in FP8."""
    plan, device, page_size = weights.plan, weights.device, config.target.page_size
    num_pages = num_target_pages(config, plan.config)
    dtype = cache_dtype(config, plan.config)
    if dtype == FP8:
        return Fp8PagedCache(plan.config, plan, num_pages, page_size, device, scales, kernels.kv_commit)
    return PagedCache(plan.config, plan, num_pages, page_size, dtype, device, kernels.kv_commit)


def target_cache_bytes(config: Config, plan: ShardPlan) -> int:
    """What `target_cache` takes on a rank."""
    element_bytes = cache_dtype(config, plan.config).itemsize
    per_page = bytes_per_page(plan, element_bytes, config.target.page_size)
    return num_target_pages(config, plan.config) * per_page


def counting(progress: Progress, total_bytes: int) -> Callable[[int], None]:
    """What a loader calls with the bytes it has read: reports them all together as `load`."""
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("load", min(done, total_bytes), total_bytes)

    return count
