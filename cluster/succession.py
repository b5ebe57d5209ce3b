"""The Coordinators of a deployment, one after the other: where one is lost, the next takes its place."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from outrider.cluster.actor_process import use_threads
from outrider.cluster.actors import ActorSpawner, worker_names
from outrider.cluster.api import EngineError, Progress
from outrider.cluster.calls import CLOSED, Calls, result_of_call
from outrider.cluster.client.ray_address import COORDINATOR_PREFIX
from outrider.cluster.coordinator import Coordinator
from outrider.cluster.orders import Orders
from outrider.cluster.placement import COORDINATOR_BUNDLE
from outrider.cluster.ray_watch import Daemon, watch_ray
from outrider.cluster.restarts import Restarts
from outrider.cluster.spares import Spares
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.workers.rounds.budget import Profiles

_POLL_S = 0.2
_STOP_S = 12.0  # longer than the Coordinator waits for a worker
_QUIET_S = 5.0  # after a start, in which first requests want the machine
_COORDINATOR = "coordinator"


class CoordinatorActor(Coordinator):
    """In a process of its own."""

    def __init__(self, config: Config, orders: Orders) -> None:
        use_threads(1)
        super().__init__(config, orders)


class Succession:
    """Starts a Coordinator, and another one in place of each that is lost, as often as `cluster.max_restarts` lets
    it. The workers stay: they belong to this, the client's process, and so does every further one (`orders.py`).

    calls: of the present one.
    """

    def __init__(self, config: Config, group: PlacementGroup, daemons: Mapping[str, Daemon]) -> None:
        """daemons: of the Ray that this process has started, if it has."""
        self._config = config
        self._group = group
        self._spawner = ActorSpawner(config, group)
        self._workers: dict[str, Any] = {}  # the newest of each name
        self._measured: Profiles
        self._restarts = Restarts(config.cluster.max_restarts, config.cluster.restart_window_s)
        self._starting = threading.Lock()
        self._closed = threading.Event()
        self._server_url = ""
        self._watch = watch_ray(daemons)
        self._spares = Spares(_spare_names(config), self._create_spare, self._starting, self._closed)
        self.calls = Calls(self._create(config.cluster.num_cpus_for_coordinator))

    def start(self, progress: Callable[[Sequence[Progress]], None]) -> list[str]:
        """Brings the deployment up; returns what the user should be told about it. Raises EngineError and
        ValueError."""
        self.provide(worker_names(self._config))
        warnings: list[str] = self._wait(self.calls.begin("start", self._workers), progress)
        self._measured = self.calls("measured")
        self._spares.begin(_QUIET_S)
        return warnings

    def provide(self, names: Sequence[str]) -> dict[str, Any]:
        """Creates workers."""
        with self._starting:
            if self._closed.is_set():  # and perhaps Ray with it, which would be started again
                raise EngineError(CLOSED)
            created = {name: self._spares.take(name) or self._spawner.spawn(name) for name in names}
            self._workers |= created
            return created

    def successor(self, reason: str, answered: bool, num_restarts: int) -> Calls:
        """Calls of another Coordinator, in place of the one that was lost for this reason.

        answered: whether a token came from that one. num_restarts: of workers and Coordinators before. Raises
        EngineError where there may be no other one.
        """
        with self._starting:
            self._restarts.lost()
            if answered:
                self._restarts.note_tokens()
            while True:
                if complaint := self._watch.complaint_after_loss():
                    raise EngineError(complaint)
                if not self._restarts.is_allowed:
                    raise EngineError(self._restarts.last_words(reason))
                with suppress(RayError):  # one that is silent may come back
                    self.calls.kill()
                self._closed.wait(self._restarts.begin())
                if self._closed.is_set():
                    raise EngineError(CLOSED)
                begun_s = time.monotonic()
                try:
                    return self._follow(reason, num_restarts + 1)
                except (EngineError, ValueError) as error:
                    if time.monotonic() - begun_s >= self._config.cluster.start_timeout_s:
                        # It has no place, or nothing starts any longer: further ones would wait as long.
                        raise EngineError(f"{reason}; nor could another one start: {error}") from error
                    reason = str(error)

    def complaint(self) -> str:
        """What is wrong with Ray itself; empty where nothing is."""
        return self._watch.complaint()

    def announce(self, url: str) -> None:
        """A server stands at `url`; every Coordinator will know it."""
        self._server_url = url
        self.calls("announce", url)

    def close(self) -> None:
        """Ends the Coordinator in order, and all calls."""
        self._closed.set()
        while not self._starting.acquire(timeout=_POLL_S):
            self.calls.close()
        try:
            # Loops that end in order leave no complaints about lost peers.
            self.calls("stop", timeout_s=_STOP_S)
        except EngineError:
            pass  # the Coordinator or a worker is gone or hangs; their place goes, and they with it
        finally:
            self.calls.close()
            self._starting.release()
            self._spares.join()

    def _wait(self, started: Any, progress: Callable[[Sequence[Progress]], None]) -> Any:
        """The result of a call that takes long, unless the Coordinator falls silent."""
        limit_s = self._config.cluster.start_timeout_s
        while not ray.wait([started], timeout=_POLL_S)[0]:
            if self._closed.is_set():
                raise EngineError(CLOSED)
            if complaint := self.complaint():
                raise EngineError(complaint)
            progress(self.calls("progress", timeout_s=limit_s))
        return result_of_call(started)

    def _follow(self, reason: str, num_restarts: int) -> Calls:
        spare = self._spares.take(_COORDINATOR)
        self.calls = Calls(spare or self._create(self._config.cluster.num_cpus_for_coordinator))
        taking_over = self.calls.begin("take_over", self._workers, self._measured, reason, num_restarts)
        self._wait(taking_over, lambda stages: None)
        if self._server_url:
            self.calls("announce", self._server_url)
        self._restarts.stands()
        return self.calls

    def _create_spare(self, name: str) -> Any:
        if name != _COORDINATOR:
            return self._spawner.spare(name)
        coordinator = self._create(0.0)
        coordinator.prepare.remote()
        return coordinator

    def _create(self, num_cpus: float) -> Any:
        actor: Any = ray.remote(CoordinatorActor)
        return actor.options(
            name=COORDINATOR_PREFIX + uuid.uuid4().hex,
            num_cpus=num_cpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, COORDINATOR_BUNDLE),
        ).remote(self._config, Orders())


def _spare_names(config: Config) -> list[str]:
    """A spare rank would hold a second GPU, or share one that is full; where the drafter is lost a stand-in works."""
    if not config.cluster.spares:
        return []
    ranks = [] if config.cluster.num_gpus_per_target else worker_names(config)[1:]
    return [_COORDINATOR, *ranks]
