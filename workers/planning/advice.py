"""What would fit in place of what does not: changes of the configuration, each planned before it is said."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from outrider.configs.schema import Config
from outrider.workers.planning.deployment import MemoryPlan, Models, on_gpu, plan_memory
from outrider.workers.setup import torch_dtype
from outrider.workers.weights.scaled import FP8

STEP_BYTES = 256 << 20  # caches are proposed in steps of this
FP8_SUFFIX = "-FP8"
MOST_PROPOSALS = 4
_COUNTED = ("target.tp_size", "deploy.num_nodes")

Change = Mapping[str, object]  # of the configuration, by keys as `target.tp_size`


@dataclass(frozen=True)
class Proposal:
    """A change with which a deployment fits: `a.b=c`, as a command line takes them."""

    overrides: tuple[str, ...]


def proposals(
    config: Config, plan: MemoryPlan, gpu_memory_bytes: int, fp8_of: Callable[[str], Models | None]
) -> list[Proposal]:
    """Changes that make a plan fit, the smallest first: of one thing, else of two.

    fp8_of: the models of a deployment whose target is the FP8 checkpoint of this id, where one is known.
    """
    search = _Search(config, gpu_memory_bytes)
    quantised = fp8_of(config.target.model)
    if quantised is not None:
        to_fp8: Change = {"target.model": config.target.model + FP8_SUFFIX}
        if not search.attempt(to_fp8, quantised):
            for change in _changes(config, plan):
                search.attempt({**to_fp8, **change}, quantised)
    for change in _changes(config, plan):
        search.attempt(change, plan.models)
    return [
        Proposal(tuple(f"{key}={_as_text(key, value)}" for key, value in change.items()))
        for change in search.fitting[:MOST_PROPOSALS]
    ]


class _Search:
    """Changes that make a configuration fit, in the order in which they are tried."""

    def __init__(self, config: Config, gpu_memory_bytes: int) -> None:
        self.fitting: list[Change] = []
        self._config = config
        self._gpu_memory_bytes = gpu_memory_bytes

    def attempt(self, change: Change, models: Models) -> bool:
        """Whether it fits with this change, or with smaller caches besides. What holds a smaller change that fits, or
        more of the same, is not tried."""
        if any(_goes_further(change, found) for found in self.fitting):
            return False
        try:
            changed = with_changes(self._config, change)
            planned = plan_memory(changed, models, self._gpu_memory_bytes)
        except ValueError:  # the configuration or the model does not go with it
            return False
        if planned.fits:
            self.fitting.append(change)
            return True
        return any(
            self.attempt({**change, **smaller}, models)
            for smaller in _smaller_caches(changed, planned)
            if not smaller.keys() & change.keys()
        )


def _goes_further(change: Change, found: Change) -> bool:
    """Whether a change has all the keys of another: the same values, or more of what is counted."""
    return all(
        key in change and (change[key] == value or (key in _COUNTED and change[key] > value))  # type: ignore[operator]
        for key, value in found.items()
    )


def with_changes(config: Config, change: Change) -> Config:
    """The configuration with some keys changed. Raises ValueError as the configuration itself does."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in change.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed: Config = replace(
        config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()}
    )
    return changed


def _as_text(key: str, value: object) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return f"{value >> 20}MiB" if isinstance(value, int) and key.endswith("_bytes") else str(value)


def _changes(config: Config, plan: MemoryPlan) -> Iterator[Change]:
    return chain(
        _smaller_caches(config, plan), _narrower_cache(config), _drafter(config), _more_ranks(config)
    )


def _smaller_caches(config: Config, plan: MemoryPlan) -> Iterator[Change]:
    """Caches smaller by what is missing where most is; the target's still has room for the longest context."""
    missing = -min((device.free_bytes for device in plan.devices), default=0)
    if missing <= 0:
        return
    target, draft = config.target, config.draft
    left = (target.kv_cache_bytes - missing) // STEP_BYTES * STEP_BYTES
    ranks = [process for process in plan.processes if not process.name.startswith("draft")]
    per_token = math.ceil(target.kv_cache_bytes / max(1, min(process.kv_tokens for process in ranks)))
    context = min(target.max_context, plan.models.target.max_context)
    if left >= max(1, per_token * context):
        yield {"target.kv_cache_bytes": left}
    left = (draft.kv_cache_bytes - missing) // STEP_BYTES * STEP_BYTES
    if left > 0 and plan.models.draft is not None:
        yield {"draft.kv_cache_bytes": left}


def _narrower_cache(config: Config) -> Iterator[Change]:
    """The same tokens in FP8."""
    if config.target.kv_cache_dtype == "auto":
        halved = config.target.kv_cache_bytes * FP8.itemsize // torch_dtype(config.target.dtype).itemsize
        yield {"target.kv_cache_dtype": "fp8", "target.kv_cache_bytes": halved}


def _drafter(config: Config) -> Iterator[Change]:
    """A drafter with a GPU of its own, or none."""
    if config.draft.placement == "shared" and on_gpu(config, "draft"):
        yield {
            "draft.placement": "separate",
            "cluster.num_gpus_per_target": 1.0,
            "cluster.num_gpus_per_draft": 1.0,
        }
    if "model" in config.draft.methods:
        kept = tuple(method for method in config.draft.methods if method != "model")
        yield {"draft.methods": kept or ("ngram",)}


def _more_ranks(config: Config) -> Iterator[Change]:
    """Ranks for all GPUs of the nodes that there are, or of twice as many; the drafter's left out."""
    deploy, given = config.deploy, config.cluster.num_gpus_per_target
    if not on_gpu(config, "target"):
        return
    per_node = deploy.gpus_per_node or 8
    for num_nodes in (deploy.num_nodes, 2 * deploy.num_nodes, 4 * deploy.num_nodes):
        own = config.draft.tp_size if on_gpu(config, "draft") and config.draft.placement == "separate" else 0
        size = int((num_nodes * per_node - own) / given)
        if size > config.target.tp_size:
            change: dict[str, object] = {"target.tp_size": size}
            if num_nodes > deploy.num_nodes:
                change["deploy.num_nodes"] = num_nodes
            yield change
