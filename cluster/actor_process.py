"""What every worker's actor has: its GPUs, threads and place, how far it is, and how Ray is to call it."""

import os
import threading
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from outrider.cluster.api import Progress
from outrider.cluster.placement import Place, given_gpus

# Ray's `max_restarts` is 0 by default: a rank that it restarted on its own would have no group. See `crew.py`.
CONCURRENCY_GROUPS = {"loop": 1, "control": 4, "stand-in": 6}


class ProgressBoard:
    """What a worker last said about each stage of its start; written and read by different threads."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._stages: dict[str, Progress] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            self._stages[stage] = Progress(self._worker, stage, done, total)

    def read(self) -> list[Progress]:
        with self._lock:
            return list(self._stages.values())


def in_place(group: PlacementGroup, place: Place) -> dict[str, Any]:
    """Options of an actor that goes there."""
    return {
        "num_cpus": place.num_cpus,
        "num_gpus": place.num_gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, place.bundle),
    }


def own_gpus() -> tuple[int, ...]:
    return given_gpus(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def whereabouts() -> dict[str, Any]:
    return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}


def use_threads(num_threads: int) -> None:
    """Lets this process compute on so many. To be called before torch is imported, with which OpenMP reads these
    variables: torch.set_num_threads would be too late.

    Ray could set them for a new process (`runtime_env`), but would then have none ready: those that it starts as it
    starts itself have none set.

    Threads that wait spin for about a millisecond, then sleep: within a forward the next matrix comes sooner
    (sleeping at once made a 0.5B forward of 37 ms take 49 ms), between forwards the core may be another's.
    """
    os.environ |= {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "GOMP_SPINCOUNT": "30000",
        "TOKENIZERS_PARALLELISM": "false",
    }
