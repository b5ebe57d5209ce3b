"""The driver's side: brings a deployment up, sends it requests, takes it down.

with Engine.start(load_config("quickstart")) as engine:
    for piece in engine.stream([{"role": "user", "content": "What is a lighthouse?"}]):
        print(piece.text, end="")
"""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from outrider.cluster.actors import spawn_workers
from outrider.cluster.api import Completion, EngineError, GenerationRequest, Piece, Progress, Prompt
from outrider.cluster.coordinator import Coordinator
from outrider.cluster.interrupts import interrupts_deferred
from outrider.cluster.placement import COORDINATOR_BUNDLE, check_cpus, reserve
from outrider.cluster.session import RaySession
from outrider.configs.schema import Config

NOTHING_SPECIAL: Mapping[str, object] = MappingProxyType({})

_POLL_S = 0.2
_STOP_TIMEOUT_S = 10.0


def no_progress(stages: Sequence[Progress]) -> None:
    """Shows nothing."""


class Engine:
    """A running deployment. Use as a context manager: leaving it ends every process it started.

    ValueError: the user can change something; the text is one line. EngineError: a worker died.
    """

    def __init__(self, session: RaySession, group: PlacementGroup, coordinator: Any) -> None:
        """Use `Engine.start`."""
        self._session = session
        self._group = group
        self._coordinator = coordinator
        self._closed = False

    @classmethod
    def start(cls, config: Config, progress: Callable[[Sequence[Progress]], None] = no_progress) -> "Engine":
        """Brings up what `config` describes; `progress` is called several times a second until it stands."""
        config = _with_absolute_paths(config)
        num_cpus = _num_cpus()
        if config.cluster.ray_address == "local" and not ray.is_initialized():
            check_cpus(config, num_cpus)
        session = RaySession(config.cluster, num_cpus)
        try:
            group = reserve(config)
        except BaseException:
            session.close()
            raise
        actor: Any = ray.remote(Coordinator)
        coordinator = actor.options(
            num_cpus=config.cluster.num_cpus_for_coordinator,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, COORDINATOR_BUNDLE),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}},
        ).remote(config, partial(spawn_workers, group=group))
        engine = cls(session, group, coordinator)
        try:
            started = coordinator.start.remote()
            while not ray.wait([started], timeout=_POLL_S)[0]:
                progress(_get(coordinator.progress.remote()))
            _get(started)
            progress(_get(coordinator.progress.remote()))
        except BaseException:
            engine.close()
            raise
        return engine

    def stream(
        self,
        prompt: Prompt,
        sampling: Mapping[str, object] = NOTHING_SPECIAL,
        draft: Mapping[str, object] = NOTHING_SPECIAL,
    ) -> Iterator[Piece]:
        """Sends a request; the iterator gives its pieces as they come. Leaving it early cancels the request.

        sampling, draft: as in `GenerationRequest`. Raises ValueError for a request that cannot be run.
        """
        request_id = uuid.uuid4().hex
        asked = GenerationRequest(prompt, dict(sampling), dict(draft))
        pieces = self._coordinator.stream.options(num_returns="streaming").remote(request_id, asked)
        return self._pieces(request_id, pieces)

    def _pieces(self, request_id: str, refs: Any) -> Iterator[Piece]:
        finished = False
        try:
            for ref in refs:
                piece: Piece = _get(ref)
                finished = bool(piece.finish_reason)
                yield piece
        except (ValueError, EngineError):
            finished = True
            raise
        finally:
            if not finished and not self._closed:
                self._coordinator.cancel.remote(request_id)
        self._raise_if_broken()

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        """Runs all requests at once and gives their answers in order. A bad request fails alone."""
        ids = [uuid.uuid4().hex for _ in requests]
        calls = zip(ids, requests, strict=True)
        refs = [self._coordinator.complete.remote(request_id, asked) for request_id, asked in calls]
        return self._completions(ids, refs)

    def _completions(self, ids: Sequence[str], refs: Sequence[Any]) -> Iterator[Completion]:
        num_done = 0
        try:
            for ref in refs:
                completion: Completion = _get(ref)
                num_done += 1
                if completion.finish_reason == "error":
                    self._raise_if_broken()
                yield completion
        finally:
            if not self._closed:
                for request_id in ids[num_done:]:
                    self._coordinator.cancel.remote(request_id)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """As `completions`, all answers at the end."""
        return list(self.completions(requests))

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters of every process, by name ("draft", "target 0", ..., "coordinator")."""
        stats: dict[str, dict[str, Any]] = _get(self._coordinator.stats.remote())
        return stats

    def trace(self) -> dict[str, list[dict[str, Any]]]:
        """Spans of every worker for `write_chrome_trace`; empty lists unless `rounds.trace` is set."""
        trace: dict[str, list[dict[str, Any]]] = _get(self._coordinator.trace.remote())
        return trace

    def close(self) -> None:
        """Ends all processes of the deployment, and Ray if `start` started it. May be called again."""
        if self._closed:
            return
        self._closed = True
        with interrupts_deferred():
            try:
                # Loops that end in order leave no complaints about lost peers.
                ray.get(self._coordinator.stop.remote(), timeout=_STOP_TIMEOUT_S)
            except RayError:
                pass  # the Coordinator or a worker is gone or hangs; their place goes, and they with it
            finally:
                remove_placement_group(self._group)
                self._session.close()

    def _raise_if_broken(self) -> None:
        failure = _get(self._coordinator.failure.remote())
        if failure:
            raise EngineError(failure)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _get(ref: Any) -> Any:
    """The value of a call to the Coordinator, or the error that it raised there."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError | EngineError):
            raise cause from None
        raise EngineError(f"the Coordinator failed: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise EngineError("the Coordinator died: its process is gone") from error


def _num_cpus() -> int:
    """CPUs this process may use; where the system cannot say, those that exist."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _with_absolute_paths(config: Config) -> Config:
    """Paths of models as every process sees them: workers have their own working directories."""
    target = replace(
        config.target, model=_absolute(config.target.model), tokenizer=_absolute(config.target.tokenizer)
    )
    return replace(config, target=target, draft=replace(config.draft, model=_absolute(config.draft.model)))


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if model and path.exists() else model
