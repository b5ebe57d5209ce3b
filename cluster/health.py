"""Whether workers live, and who is to blame when they do not."""

import asyncio
import re
import traceback
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from outrider.cluster.api import EngineError
from outrider.workers.link.lost import LinkLostError

T = TypeVar("T")

_PLACE = re.compile(r'File "(.+)", line (\d+)')
# A worker that lives answers in milliseconds, whatever it computes; on a busy machine all of them are slow.
_ANSWER_S = 10.0
_AFTER_OTHERS_S = 3.0
_PULSE_S = 1.0


class WorkerLostError(EngineError):
    """A worker's process is gone."""


class PeerComplaintError(EngineError):
    """A worker says that another one is gone or silent: it is not the cause."""


class LinkComplaintError(PeerComplaintError):
    """Rank 0 says that the DraftWorker is gone or silent: the group of the ranks is whole."""


async def result_of(name: str, doing: str, call: Awaitable[T]) -> T:
    """The result of a worker's call. ValueErrors pass; all else becomes an EngineError of one line."""
    try:
        return await call
    except RayActorError as error:
        raise WorkerLostError(f"{name} died during {doing}: its process is gone") from error
    except RayTaskError as error:
        raise _one_line(name, doing, error.cause, str(error)) from error
    except ValueError:
        raise
    except Exception as error:
        # Whatever ended the worker's call, its callers get to know.
        raise _one_line(name, doing, error, traceback.format_exc()) from error


async def answers_of(handles: Mapping[str, Any], method: str, doing: str) -> dict[str, Any]:
    """What every worker answers to a call that takes no time, by name. Raises EngineError for one that does
    not answer."""
    answers, silent = await _ask(handles, method, doing)
    if silent:
        raise EngineError(_silence(silent))
    return answers


@dataclass(frozen=True)
class Break:
    """Why a deployment does not go on as it is."""

    reason: str
    lost: frozenset[str]  # the workers that caused it and cannot stay; empty: they lost each other
    counts: bool = True  # among the restarts in a row that may be in vain


async def blame(runs: Mapping[str, "asyncio.Task[None]"], handles: Mapping[str, Any]) -> Break:
    """Why the deployment broke, when at least one of the loops has ended: the likeliest cause.

    runs: the loops of the workers. handles: of the same workers; each must answer to `progress`.
    A process that is gone or does not answer is the cause of its peers' complaints.
    """
    ended = {name: run.exception() for name, run in runs.items() if run.done()}
    errors = {name: error for name, error in ended.items() if error is not None}
    gone = {name: error for name, error in errors.items() if isinstance(error, WorkerLostError)}
    if gone:
        return Break(str(next(iter(gone.values()))), frozenset(gone))
    try:
        _, silent = await _ask(handles, "progress", "run")
    except EngineError as error:
        return Break(str(error), frozenset())
    if silent:
        return Break(_silence(silent), frozenset(silent))
    own = {name: error for name, error in errors.items() if not isinstance(error, PeerComplaintError)}
    if own:
        return Break(str(next(iter(own.values()))), frozenset(own))
    if errors:
        return Break(str(next(iter(errors.values()))), frozenset())
    return Break(f"{next(iter(ended))} ended on its own", frozenset())


async def silence(handles: Mapping[str, Any], timeout_s: float) -> Break:
    """Asks workers whether they live, until some have not answered for `timeout_s`; each must answer to `progress`.

    One whose process is gone is not silent: whoever awaits its loop hears of that.
    """
    period_s = min(_PULSE_S, timeout_s / 4)
    silent_s = dict.fromkeys(handles, 0.0)

    async def ask(name: str, handle: Any) -> None:
        while True:
            try:
                await handle.progress.remote()
            except RayError:
                del silent_s[name]
                return
            silent_s[name] = 0.0
            await asyncio.sleep(period_s)

    asking = [asyncio.create_task(ask(name, handle)) for name, handle in handles.items()]
    try:
        while True:
            await asyncio.sleep(period_s)
            for name in silent_s:
                # However long this process was kept from running: it did not hear the others meanwhile.
                silent_s[name] += period_s
            silent = [name for name, seconds in silent_s.items() if seconds > timeout_s]
            if silent:
                return Break(_silence(silent), frozenset(silent))
    finally:
        for task in asking:
            task.cancel()


async def _ask(handles: Mapping[str, Any], method: str, doing: str) -> tuple[dict[str, Any], list[str]]:
    """Answers by name, and the names of those who gave none in time."""
    calls = {
        name: asyncio.ensure_future(result_of(name, doing, getattr(handle, method).remote()))
        for name, handle in handles.items()
    }
    waiting, timeout_s = set(calls.values()), _ANSWER_S
    while waiting:
        done, waiting = await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            break
        timeout_s = min(_AFTER_OTHERS_S, _ANSWER_S)
    silent = [name for name, call in calls.items() if not call.done()]
    for name in silent:
        calls[name].cancel()
    return {name: call.result() for name, call in calls.items() if name not in silent}, silent


def _silence(names: list[str]) -> str:
    return f"{' and '.join(names)} did not answer for seconds: stopped, or on a node that is gone"


def _one_line(name: str, doing: str, error: BaseException, trace: str) -> Exception:
    """`trace` is the traceback as text: the place of the error is all of it that goes into the message."""
    if isinstance(error, ValueError):
        return error
    lines = str(error).strip().splitlines() or ["no message"]
    places = _PLACE.findall(trace)
    place = f" ({Path(places[-1][0]).name}, line {places[-1][1]})" if places else ""
    kind = EngineError
    if isinstance(error, ConnectionError):
        kind = LinkComplaintError if isinstance(error, LinkLostError) else PeerComplaintError
    return kind(f"{name} failed during {doing}: {type(error).__name__}: {lines[0]}{place}")
