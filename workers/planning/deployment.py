"""Which processes share a GPU, what that leaves free, and whether all of it fits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from outrider.configs.processors import shares_gpus
from outrider.configs.schema import Config
from outrider.workers.planning.heads import heads_of, num_taps_of
from outrider.workers.planning.processes import ProcessMemory, draft_memory, target_memory
from outrider.workers.setup import with_draft_dtype
from outrider.workers.weights.config import ModelConfig

# Left free on each GPU: torch's allocator rounds up and keeps holes, and what is estimated may be more.
MARGIN_FRACTION = 0.02


@dataclass(frozen=True)
class Models:
    """The models of a deployment, and where their sizes were read. draft: None without method `model`."""

    target: ModelConfig
    target_from: str
    draft: ModelConfig | None
    draft_from: str


@dataclass(frozen=True)
class Device:
    """A GPU, or the memory of a node whose processes compute on CPUs.

    Attributes:
        name: "GPU 0", ..., or "CPU".
        memory_bytes: what it has.
        processes: that are there.
    """

    name: str
    memory_bytes: int
    processes: tuple[ProcessMemory, ...]

    @property
    def used_bytes(self) -> int:
        return sum(process.total for process in self.processes)

    @property
    def free_bytes(self) -> int:
        """What is left, after the margin; negative where it does not fit."""
        return self.memory_bytes - math.ceil(MARGIN_FRACTION * self.memory_bytes) - self.used_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """All processes in their places.

    Attributes:
        devices: GPUs in order, then the CPU where a process computes there.
        models: of which they were planned.
        problems: why it cannot be so, one line each; none: it fits.
        not_counted: what is not known here, one line each.
    """

    devices: tuple[Device, ...]
    models: Models
    problems: tuple[str, ...]
    not_counted: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def processes(self) -> list[ProcessMemory]:
        """The drafter's last."""
        found = [process for device in self.devices for process in device.processes]
        return sorted(found, key=lambda process: process.name.startswith("draft"))


def plan_memory(config: Config, models: Models, gpu_memory_bytes: int) -> MemoryPlan:
    """What every process will keep where.

    gpu_memory_bytes: of each GPU.

    Raises:
        ValueError: a cache does not hold a page, or the target's ranks cannot share the model.
    """
    config = with_draft_dtype(config, "cuda" if on_gpu(config, "draft") else "cpu")
    heads = heads_of(config, models.target)
    num_taps = num_taps_of(config, models.target)
    ranks = [target_memory(config, models.target, rank, num_taps) for rank in range(config.target.tp_size)]
    drafters = [
        draft_memory(config, models.draft, rank, heads, num_taps) for rank in range(config.draft.tp_size)
    ]
    devices = _places(config, ranks, drafters, gpu_memory_bytes)
    return MemoryPlan(devices, models, tuple(_problems(config, devices)), heads.unknown)


def on_gpu(config: Config, role: Literal["target", "draft"]) -> bool:
    """Whether the processes of a role are given GPUs and compute there."""
    device = config.target.device if role == "target" else config.draft.device
    given = config.cluster.num_gpus_per_target if role == "target" else config.cluster.num_gpus_per_draft
    return device != "cpu" and given > 0


def _places(
    config: Config,
    ranks: Sequence[ProcessMemory],
    drafters: Sequence[ProcessMemory],
    gpu_memory_bytes: int,
) -> tuple[Device, ...]:
    """As Ray fills GPUs by the fractions that are asked for; where `draft.placement` is shared, rank by rank. A
    separate drafter that finds room beside ranks is with the fullest of those it may be with: which one it will be is
    Ray's to say."""
    cluster = config.cluster
    gpus: list[Device] = []
    together = 1
    if on_gpu(config, "target"):
        together = max(1, int(1 / cluster.num_gpus_per_target + 1e-6))
        for first in range(0, len(ranks), together):
            gpus.append(Device(f"GPU {len(gpus)}", gpu_memory_bytes, tuple(ranks[first : first + together])))
    needed = cluster.num_gpus_per_draft - 1e-6
    for rank, drafter in enumerate(drafters if on_gpu(config, "draft") else ()):
        with_room = [
            index
            for index, gpu in enumerate(gpus)
            if 1 - sum(_share(config, process) for process in gpu.processes) >= needed
        ]
        if shares_gpus(config.draft, cluster) and gpus:
            index = rank // together
        elif with_room:
            index = min(with_room, key=lambda index: gpus[index].free_bytes)
        else:
            index = len(gpus)
            gpus.append(Device(f"GPU {index}", gpu_memory_bytes, ()))
        gpus[index] = replace(gpus[index], processes=(*gpus[index].processes, drafter))
    placed = {process.name for gpu in gpus for process in gpu.processes}
    on_cpu = tuple(process for process in (*ranks, *drafters) if process.name not in placed)
    memory = config.deploy.num_nodes * config.deploy.memory_per_node_bytes
    return (*gpus, Device("CPU", memory, on_cpu)) if on_cpu else tuple(gpus)


def _share(config: Config, process: ProcessMemory) -> float:
    """Of a GPU."""
    is_drafter = process.name.startswith("draft")
    return config.cluster.num_gpus_per_draft if is_drafter else config.cluster.num_gpus_per_target


def _problems(config: Config, devices: Sequence[Device]) -> list[str]:
    deploy, problems = config.deploy, []
    num_gpus = sum(device.name != "CPU" for device in devices)
    there = deploy.num_nodes * deploy.gpus_per_node
    if 0 < there < num_gpus:
        problems.append(f"{num_gpus} GPUs are needed, deploy.num_nodes * deploy.gpus_per_node are {there}")
    full = sorted(
        (device for device in devices if device.free_bytes < 0), key=lambda device: device.free_bytes
    )
    if full:
        names = ", ".join(process.name for process in full[0].processes)
        others = f", and {len(full) - 1} more are too full" if len(full) > 1 else ""
        problems.append(
            f"{full[0].name} ({names}) would take {gib(full[0].used_bytes)} of {gib(full[0].memory_bytes)}, of which "
            f"{MARGIN_FRACTION:.0%} stay free{others}"
        )
    return problems


def gib(num_bytes: int) -> str:
    """As a text, in GiB."""
    return f"{num_bytes / 2**30:.1f} GiB"
