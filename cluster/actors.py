"""The workers as Ray actors: thin wrappers, so that a worker itself knows nothing of Ray.

`run` blocks for as long as the worker lives and has a thread of its own; the other calls share a few.
A worker's module, and torch with it, is imported in the worker's process only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup

from outrider.cluster.actor_process import (
    CONCURRENCY_GROUPS,
    ProgressBoard,
    in_place,
    own_gpus,
    use_threads,
    whereabouts,
)
from outrider.cluster.api import Progress
from outrider.cluster.draft_ranks import DraftRanks
from outrider.cluster.placement import Place, places_in
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.workers.rounds.budget import Profiles
    from outrider.workers.sequences.sequence import Request, TokenEvent


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


class TargetActor:
    """One rank of the target; in rank 0's process, where needed, also a stand-in for the DraftWorker."""

    def __init__(self, config: Config, rank: int) -> None:
        use_threads(config.target.num_threads)

        from outrider.workers.target import TargetWorker

        self._config = config
        self._worker = TargetWorker(config, rank, own_gpus())
        self._loop = _Loop(self._worker)
        self._board = ProgressBoard(f"target {rank}")

    def load(self) -> list[str]:
        return self._worker.load(self._board.report)

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
        return {**self._worker.stats(), **whereabouts()}

    @ray.method(concurrency_group="control")
    def trace_events(self) -> list[dict[str, Any]]:
        return self._worker.trace_events()


class DraftActor:
    """The DraftWorker: requests go in here and tokens come out. The drafter's further ranks belong to its process."""

    def __init__(self, config: Config, others: Sequence[Place]) -> None:
        """others: where the further ranks go."""
        self._ranks = DraftRanks(config, others)  # first: they import torch at the same time
        use_threads(config.draft.num_threads)

        from outrider.workers.draft import DraftWorker

        self._worker = DraftWorker(config, own_gpus(), self._ranks)
        self._loop = _Loop(self._worker)
        self._board = ProgressBoard("draft")

    def load(self) -> None:
        self._ranks.load(self._worker.lose_rank)
        self._worker.load(self._board.report)
        self._ranks.are_up()

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
        return [*self._board.read(), *self._ranks.progress()]

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, Any]:
        return {**self._worker.stats(), **whereabouts()}

    @ray.method(concurrency_group="control")
    def trace_events(self) -> list[dict[str, Any]]:
        return self._worker.trace_events()

    @ray.method(concurrency_group="control")
    def of_ranks(self, method: str) -> dict[str, Any]:
        """What the further ranks answer to `stats` or `trace_events`, by name."""
        return self._ranks.answers(method)


class StandInActor(DraftActor):
    """The same calls, of a DraftWorker without a drafter. No actor of its own: part of rank 0."""

    def __init__(self, config: Config) -> None:
        from outrider.workers.stand_in import StandIn

        self._ranks = DraftRanks(config, ())
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
        drafts, targets = places_in(self.group, self.config)
        if name == "draft":
            drafter = _with_groups(DraftActor)
            options = in_place(self.group, drafts[0])
            return drafter.options(**options).remote(self.config, drafts[1:])
        rank = self._rank(name)
        return self._spawn_rank(rank, targets[rank])

    def spare(self, name: str) -> Any:
        """One for a rank of the target, beside the one that has its place: it reserves nothing."""
        rank = self._rank(name)
        _, targets = places_in(self.group, self.config)
        return self._spawn_rank(rank, replace(targets[rank], num_cpus=0.0))

    def _rank(self, name: str) -> int:
        return worker_names(self.config).index(name) - 1

    def _spawn_rank(self, rank: int, place: Place) -> Any:
        options = in_place(self.group, place)
        return _with_groups(TargetActor).options(**options).remote(self.config, rank)


def _with_groups(actor: type) -> Any:
    remote: Any = ray.remote  # its types do not know concurrency_groups
    return remote(concurrency_groups=CONCURRENCY_GROUPS)(actor)
