"""Whether workers live, and who is to blame when they do not."""

import asyncio
import re
import traceback
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from outrider.cluster.api import EngineError

T = TypeVar("T")

_PLACE = re.compile(r'File "(.+)", line (\d+)')
# A worker that lives answers in milliseconds, whatever it computes; on a busy machine all of them are slow.
_ANSWER_S = 10.0
_AFTER_OTHERS_S = 3.0


class WorkerLostError(EngineError):
    """A worker's process is gone."""


class PeerComplaintError(EngineError):
    """A worker says that another one is gone or silent: it is not the cause."""


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


async def blame(runs: Mapping[str, "asyncio.Task[None]"], handles: Mapping[str, Any]) -> str:
    """Why the deployment broke, when at least one of the loops has ended: the likeliest cause.

    runs: the loops of the workers. handles: of the same workers; each must answer to `progress`.
    A process that is gone or does not answer is the cause of its peers' complaints.
    """
    ended = {name: run.exception() for name, run in runs.items() if run.done()}
    errors = [error for error in ended.values() if error is not None]
    lost = [error for error in errors if isinstance(error, WorkerLostError)]
    if lost:
        return str(lost[0])
    try:
        await answers_of(handles, "progress", "run")
    except EngineError as error:
        return str(error)
    if errors:
        return str(min(errors, key=lambda error: isinstance(error, PeerComplaintError)))
    return f"{next(iter(ended))} ended on its own"


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
    kind = PeerComplaintError if isinstance(error, ConnectionError) else EngineError
    return kind(f"{name} failed during {doing}: {type(error).__name__}: {lines[0]}{place}")
