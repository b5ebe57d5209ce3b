"""The workers as Ray actors: thin wrappers, so that a worker itself knows nothing of Ray.

`run` blocks for as long as the worker lives and has a thread of its own; the other calls share a few.
A worker's module, and torch with it, is imported in the worker's process only.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from outrider.cluster.api import Progress
from outrider.cluster.placement import DRAFT_BUNDLE, given_gpus, target_bundles
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.workers.rounds.budget import Profiles
    from outrider.workers.sequences.sequence import Request, TokenEvent

# Ray's `max_restarts` is 0 by default: a rank that it restarted on its own would have no group. See `crew.py`.
_CONCURRENCY_GROUPS = {"loop": 1, "control": 4, "stand-in": 6}


@dataclass(frozen=True)
class Standing:
    """Where a worker has joined the others, for a Coordinator that did not see it."""

    epoch: int  # -1: nowhere, or only just
    host: str = ""
    port: int = 0  # of the store where all met
    stand_in_epoch: int = -1  # of the stand-in in this process


class _Loop:
    """A worker's `run`, and how it has ended."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._error: BaseException | None = None
        self.standing = Standing(-1)

    def join(self, joining: Callable[[], None], standing: Standing) -> None:
        """Calls `joining`, which brings the worker there."""
        self.standing = replace(standing, epoch=-1)
        joining()
        self.standing = standing

    def run(self) -> None:
        self._error = None
        try:
            self._worker.run()
        except BaseException as error:
            self._error = error
            raise

    def rest(self) -> None:
        """Raises what the last `run` raised."""
        if self._error is not None:
            raise self._error


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


class TargetActor:
    """One rank of the target; in rank 0's process, where needed, also a stand-in for the DraftWorker."""

    def __init__(self, config: Config, rank: int) -> None:
        from outrider.workers.target import TargetWorker

        self._config = config
        self._worker = TargetWorker(config, rank, _given_gpus())
        self._loop = _Loop(self._worker)
        self._board = ProgressBoard(f"target {rank}")

    def load(self) -> None:
        self._worker.load(self._board.report)

    def open_store(self) -> tuple[str, int]:
        return self._worker.open_store(ray.util.get_node_ip_address())

    def connect(self, host: str, port: int, epoch: int) -> None:
        self._loop.join(lambda: self._worker.connect(host, port, epoch), Standing(epoch, host, port))

    def relink(self, epoch: int) -> None:
        standing = replace(self._loop.standing, epoch=epoch)
        self._loop.join(lambda: self._worker.relink(epoch), standing)

    @ray.method(concurrency_group="loop")
    def run(self) -> None:
        self._loop.run()

    @ray.method(concurrency_group="loop")
    def rest(self) -> None:
        """Ends with the `run` that another Coordinator began, and as that did."""
        self._loop.rest()

    @ray.method(concurrency_group="control")
    def standing(self) -> Standing:
        stand_in = self.__dict__.get("_stand_in")  # without making one
        return replace(
            self._loop.standing, stand_in_epoch=-1 if stand_in is None else stand_in.standing().epoch
        )

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        self._worker.abort()

    @ray.method(concurrency_group="stand-in")
    def stand_in(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the stand-in, `load` before others; see `cluster.stand_in.StandInHandle`."""
        return getattr(self._stand_in, method)(*arguments)

    @cached_property
    def _stand_in(self) -> "StandInActor":
        return StandInActor(self._config)

    @ray.method(concurrency_group="control")
    def progress(self) -> list[Progress]:
        return self._board.read()

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, Any]:
        return {**self._worker.stats(), **_whereabouts()}

    @ray.method(concurrency_group="control")
    def trace_events(self) -> list[dict[str, Any]]:
        return self._worker.trace_events()


class DraftActor:
    """The DraftWorker: requests go in here and tokens come out."""

    def __init__(self, config: Config) -> None:
        from outrider.workers.draft import DraftWorker

        self._worker = DraftWorker(config, _given_gpus())
        self._loop = _Loop(self._worker)
        self._board = ProgressBoard("draft")

    def load(self) -> None:
        self._worker.load(self._board.report)

    def connect(self, host: str, port: int, epoch: int) -> None:
        self._loop.join(lambda: self._worker.connect(host, port, epoch), Standing(epoch, host, port))

    def profile(self) -> "Profiles":
        return self._worker.profile(self._board.report)

    def take_over(self, measured: "Profiles") -> None:
        self._worker.take_over(measured)

    def calibrate(self, request: "Request") -> list[str]:
        return self._worker.calibrate(request, self._board.report)

    @ray.method(concurrency_group="loop")
    def run(self) -> None:
        self._loop.run()

    @ray.method(concurrency_group="loop")
    def rest(self) -> None:
        """Ends with the `run` that another Coordinator began, and as that did."""
        self._loop.rest()

    @ray.method(concurrency_group="control")
    def standing(self) -> Standing:
        return self._loop.standing

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        self._worker.stop()

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        self._worker.abort()

    @ray.method(concurrency_group="control")
    def submit(self, epoch: int, requests: "list[Request]") -> None:
        self._worker.submit(epoch, requests)

    @ray.method(concurrency_group="control")
    def cancel(self, request_id: str) -> None:
        self._worker.cancel(request_id)

    @ray.method(concurrency_group="control")
    def next_events(self, epoch: int, timeout_s: float) -> "list[TokenEvent]":
        return self._worker.next_events(epoch, timeout_s)

    @ray.method(concurrency_group="control")
    def progress(self) -> list[Progress]:
        return self._board.read()

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, Any]:
        return {**self._worker.stats(), **_whereabouts()}

    @ray.method(concurrency_group="control")
    def trace_events(self) -> list[dict[str, Any]]:
        return self._worker.trace_events()


class StandInActor(DraftActor):
    """The same calls, of a DraftWorker without a drafter. No actor of its own: part of rank 0."""

    def __init__(self, config: Config) -> None:
        from outrider.workers.stand_in import StandIn

        self._worker = StandIn(config)
        self._loop = _Loop(self._worker)
        self._board = ProgressBoard("draft")


def worker_names(config: Config) -> list[str]:
    """The workers of a deployment, as messages and traces call them."""
    return ["draft", *(f"target {rank}" for rank in range(config.target.tp_size))]


@dataclass(frozen=True)
class ActorSpawner:
    """Workers as Ray actors in the bundles of a placement group."""

    config: Config
    group: PlacementGroup

    def spawn(self, name: str) -> Any:
        """A new process for a worker, one of `worker_names`; does not wait for it."""
        remote: Any = ray.remote  # its types do not know concurrency_groups
        config, cluster = self.config, self.config.cluster
        if name == "draft":
            drafter = remote(concurrency_groups=_CONCURRENCY_GROUPS)(DraftActor)
            return drafter.options(
                num_cpus=cluster.num_cpus_per_draft,
                num_gpus=cluster.num_gpus_per_draft,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, DRAFT_BUNDLE),
                runtime_env={"env_vars": _thread_variables(config.draft.num_threads)},
            ).remote(config)
        rank = worker_names(config).index(name) - 1
        bundle = target_bundles(self.group, config.target.tp_size)[rank]
        target = remote(concurrency_groups=_CONCURRENCY_GROUPS)(TargetActor)
        return target.options(
            num_cpus=cluster.num_cpus_per_target,
            num_gpus=cluster.num_gpus_per_target,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, bundle),
            runtime_env={"env_vars": _thread_variables(config.target.num_threads)},
        ).remote(config, rank)


def _given_gpus() -> tuple[int, ...]:
    return given_gpus(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _whereabouts() -> dict[str, Any]:
    return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}


def _thread_variables(num_threads: int) -> dict[str, str]:
    """OpenMP reads these when torch is imported, which is before a worker could call torch.set_num_threads.

    Threads that wait spin for about a millisecond, then sleep: within a forward the next matrix comes sooner
    (sleeping at once made a 0.5B forward of 37 ms take 49 ms), between forwards the core may be another's.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "GOMP_SPINCOUNT": "30000",
        "TOKENIZERS_PARALLELISM": "false",
    }
