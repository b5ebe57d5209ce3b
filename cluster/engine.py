"""The driver's side: brings a deployment up, sends it requests, takes it down.

with Engine.start(load_config("quickstart")) as engine:
    for piece in engine.stream([{"role": "user", "content": "What is a lighthouse?"}]):
        print(piece.text, end="")
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from outrider.cluster.api import EngineError, GenerationRequest, Progress, Prompt, ServedModel
from outrider.cluster.calls import CLOSED, FORKED
from outrider.cluster.engine_requests import Asked, Sampling, as_sent, fields_of, requests_of, require_config
from outrider.cluster.inbox import Box, CompletionStream, Inbox, PieceStream
from outrider.cluster.interrupts import interrupts_deferred
from outrider.cluster.placement import check_cpus, reserve
from outrider.cluster.request_options import NOTHING_ASKED
from outrider.cluster.session import RaySession
from outrider.cluster.succession import Succession
from outrider.configs.schema import Config, Eagle3Config, MedusaConfig, MtpConfig, ParallelConfig
from outrider.workers.answer import Completion

_log = logging.getLogger("outrider")

_STATS_S = 30.0  # longer than the Coordinator waits for a worker
_TRACE_S = 60.0  # spans of a long run are many megabytes


def no_progress(stages: Sequence[Progress]) -> None:
    """Shows nothing."""


class Engine:
    """A running deployment. Use as a context manager: leaving it (the outermost, of several) ends every process it
    started.

    ValueError: the user can change something; the text is one line. EngineError: a worker died.
    """

    def __init__(self, session: RaySession, group: PlacementGroup, succession: Succession) -> None:
        """Use `Engine.start`."""
        self._session = session
        self._group = group
        self._succession = succession
        self._inbox: Inbox | None = None
        self._closed = False
        self._num_entered = 0

    @classmethod
    def start(cls, config: Config, progress: Callable[[Sequence[Progress]], None] = no_progress) -> "Engine":
        """Brings up what `config` describes; `progress` is called several times a second until it stands."""
        require_config(config)
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
        succession = Succession(config, group, session.daemons)
        engine = cls(session, group, succession)
        try:
            for warning in succession.start(progress):
                _log.warning(warning)
            progress(succession.calls("progress"))
            engine._inbox = Inbox(succession.calls, succession)
        except BaseException:
            engine.close()
            raise
        return engine

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = NOTHING_ASKED,
        draft: Mapping[str, object] = NOTHING_ASKED,
        acceptance: Mapping[str, object] = NOTHING_ASKED,
        template: Mapping[str, object] = NOTHING_ASKED,
    ) -> PieceStream:
        """Sends a request; the iterator gives its pieces as they come. Leaving it early cancels the request.

        sampling, draft, acceptance, template: as in `GenerationRequest`; a `SamplingParams` says all of its fields,
        and none of the config's is left. The iterator raises ValueError for a request that cannot be run.
        """
        inbox = self._open_inbox()
        asked = as_sent(GenerationRequest(prompt, fields_of(sampling), draft, acceptance, template))
        (request_id,) = inbox.send([asked], whole=False)
        return PieceStream(inbox, request_id)

    def completions(
        self,
        prompts: Asked | Iterable[Asked],
        sampling: Sampling = NOTHING_ASKED,
        draft: Mapping[str, object] = NOTHING_ASKED,
        acceptance: Mapping[str, object] = NOTHING_ASKED,
        template: Mapping[str, object] = NOTHING_ASKED,
    ) -> CompletionStream:
        """Runs all prompts at once and gives their answers in order, of one prompt one. A bad request fails alone.

        sampling, draft, acceptance, template: of every prompt; a `GenerationRequest` among them brings its own.
        """
        inbox = self._open_inbox()
        requests = requests_of(prompts, sampling, draft, acceptance, template)
        return CompletionStream(inbox, inbox.send(requests, whole=True))

    def generate(
        self,
        prompts: Asked | Iterable[Asked],
        sampling: Sampling = NOTHING_ASKED,
        draft: Mapping[str, object] = NOTHING_ASKED,
        acceptance: Mapping[str, object] = NOTHING_ASKED,
        template: Mapping[str, object] = NOTHING_ASKED,
    ) -> list[Completion]:
        """As `completions`, all answers at the end."""
        return list(self.completions(prompts, sampling, draft, acceptance, template))

    def post(self, asked: GenerationRequest, box: Box) -> str:
        """Sends a request without waiting for anything, for event loops: its answers go into `box`, which is called
        in another thread. Returns the request's id, for `drop`. Raises ValueError for what cannot be sent.

        Pieces come, the last of them with a finish reason; or a Refusal; or an EngineError, once or more often.
        """
        return self._open_inbox().post(asked, box)

    def finish(self, request_id: str) -> None:
        """The last answer to a request of `post` was taken. Does not block."""
        if self._inbox is not None:
            self._inbox.finish(request_id)

    def drop(self, request_ids: Sequence[str]) -> None:
        """Nobody waits for these requests of `post` any longer: those that run are cancelled. Does not block."""
        if self._inbox is not None:
            self._inbox.drop(request_ids)

    @property
    def failure(self) -> str:
        """Why the deployment is unusable; empty while it works."""
        if self._closed or self._inbox is None:
            return CLOSED
        return self._inbox.failure

    @property
    def restarting(self) -> str:
        """Why no tokens come for now: workers were lost and are started again. Requests are taken, and go on then."""
        return "" if self._inbox is None else self._inbox.restarting

    def describe(self) -> ServedModel:
        """What there is to know of the target without looking into its weights."""
        described: ServedModel = self._succession.calls("describe")
        return described

    def tokenize(self, prompt: Prompt, template: Mapping[str, object] = NOTHING_ASKED) -> tuple[int, ...]:
        """The tokens that a request with this prompt would begin with. Raises ValueError as such a request would."""
        tokens: tuple[int, ...] = self._succession.calls("tokenize", prompt, dict(template))
        return tokens

    def announce(self, url: str) -> None:
        """Lets clients that know Ray's address find the server at `url`."""
        self._succession.announce(url)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters of every process, by name ("draft", "target 0", ..., "coordinator")."""
        stats: dict[str, dict[str, Any]] = self._succession.calls("stats", timeout_s=_STATS_S)
        return stats

    def trace(self) -> dict[str, list[dict[str, Any]]]:
        """Spans of every worker for `write_chrome_trace`; empty lists unless `rounds.trace` is set."""
        trace: dict[str, list[dict[str, Any]]] = self._succession.calls("trace", timeout_s=_TRACE_S)
        return trace

    def close(self) -> None:
        """Ends all processes of the deployment, and Ray if `start` started it. May be called again.

        Afterwards every other call, and every stream that is open, raises EngineError.
        """
        if self._closed or self._succession.calls.forked:
            return
        self._closed = True
        failed = self._inbox is None or bool(self._inbox.failure)
        with interrupts_deferred():
            if self._inbox is not None:
                self._inbox.close(CLOSED)
            try:
                self._succession.close()
            finally:
                if not self._succession.complaint():  # nobody would hear it, nor answer
                    remove_placement_group(self._group)
                self._session.close(failed)

    def _open_inbox(self) -> Inbox:
        if self._succession.calls.forked:
            raise EngineError(FORKED)
        if self._closed or self._inbox is None:
            raise EngineError(CLOSED)
        return self._inbox

    def __enter__(self) -> "Engine":
        self._num_entered += 1
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._num_entered -= 1
        if not self._num_entered:
            self.close()


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
    draft = replace(
        config.draft,
        model=_absolute(config.draft.model),
        head=_absolute(config.draft.head),
        medusa=MedusaConfig(_absolute(config.draft.medusa.model)),
        eagle3=Eagle3Config(_absolute(config.draft.eagle3.model)),
        mtp=MtpConfig(_absolute(config.draft.mtp.model)),
        parallel=ParallelConfig(_absolute(config.draft.parallel.model)),
    )
    judges = tuple(replace(judge, model=_absolute(judge.model)) for judge in config.acceptance.judges)
    acceptance = replace(config.acceptance, judges=judges)
    return replace(config, target=target, draft=draft, acceptance=acceptance)


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if model and path.exists() else model
