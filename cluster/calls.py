"""Calls of a client to the Coordinator: each ends, with a result or with one clear error."""

import os
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from outrider.cluster.api import CoordinatorLostError, EngineError

CLOSED = "the engine was closed"
FORKED = "an engine answers in the process that started it alone: this one was forked from it"

_ANSWER_S = 15.0  # calls are answered in milliseconds; a busy machine needs more
_POLL_S = 0.2
_END_S = 5.0


class Calls:
    """Calls methods of an actor by name, from any thread, until it is closed.

    All raise ValueError and EngineError as the actor does, and EngineError when it is gone, silent or closed.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._num_running = 0
        self._closed = False

    def __call__(self, method: str, *args: object, timeout_s: float = _ANSWER_S) -> Any:
        """The result of `method`, which takes no longer than `timeout_s`."""
        if self.forked:
            raise EngineError(FORKED)
        # A call to Ray after its end would start another one, so the end waits for the calls.
        with self._changed:
            if self._closed:
                raise EngineError(CLOSED)
            self._num_running += 1
        try:
            return self._result(getattr(self._actor, method).remote(*args), timeout_s)
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that is connected: what it asks Ray is never answered."""
        return os.getpid() != self._process

    def begin(self, method: str, *args: object) -> Any:
        """A call without waiting for its result."""
        return getattr(self._actor, method).remote(*args)

    def kill(self) -> None:
        """Ends the actor's process, whatever it does."""
        ray.kill(self._actor)

    def close(self) -> None:
        """Ends calls under way with an error, and refuses further ones."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._num_running, timeout=_END_S)

    def _result(self, ref: Any, timeout_s: float) -> Any:
        limit_s = time.monotonic() + timeout_s
        while not ray.wait([ref], timeout=_POLL_S)[0]:
            if self._closed:
                raise EngineError(CLOSED)
            if time.monotonic() > limit_s:
                raise CoordinatorLostError(
                    f"the Coordinator did not answer for {timeout_s:g} s: its process is stopped"
                )
        return result_of_call(ref)


def result_of_call(ref: Any) -> Any:
    """The value of a call to the Coordinator that has ended, or the error that it raised there."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError | EngineError):
            raise cause from None
        raise EngineError(f"the Coordinator failed: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise CoordinatorLostError("the Coordinator died: its process is gone") from error
    except RayError as error:
        reason = (str(error).splitlines() or ["no message"])[0]
        raise EngineError(f"the Coordinator cannot be reached: {type(error).__name__}: {reason}") from error
