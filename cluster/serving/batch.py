"""OpenAI's batch format: a file of requests in, a file with exactly one answer for each of them out.

An answer is a line that is appended when it is whole, so whatever ends the run, the output holds whole lines and at
most a torn last one, which the next run cuts off before it answers what is missing.
Source of the format: https://platform.openai.com/docs/api-reference/batch/request-input
"""

import asyncio
import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import ValidationError

from outrider.cluster.api import EngineError
from outrider.cluster.serving.answers import Answers
from outrider.cluster.serving.errors import ApiError, of_engine, of_validation
from outrider.cluster.serving.jobs import Job, chat_job, check_model, completion_job
from outrider.cluster.serving.protocol import ChatRequest, CompletionRequest, Generation
from outrider.cluster.serving.usage import Tally
from outrider.cluster.serving.whole import whole_answer
from outrider.cluster.serving.writers import ChatWriter, CompletionWriter, TokenNames, Writer
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.cluster.engine import Engine

_URLS = ("/v1/chat/completions", "/v1/completions")


def read_input(path: Path) -> dict[str, dict[str, Any]]:
    """The requests of a file by their ids, in order. Raises ValueError naming the line that is none."""
    requests: dict[str, dict[str, Any]] = {}
    for number, line in _lines(path):
        try:
            request = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"--input must have a JSON object a line, line {number} has none: {error}"
            ) from error
        custom_id = request.get("custom_id") if isinstance(request, dict) else None
        if not isinstance(custom_id, str) or not custom_id:
            raise ValueError(f"--input must have a text custom_id in each line, line {number} has none")
        if custom_id in requests:
            raise ValueError(
                f"--input must have each custom_id once, line {number} repeats {custom_id[:100]!r}"
            )
        requests[custom_id] = request
    return requests


class Output:
    """The file of answers: appended to by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Opens it, makes it if need be, and cuts off what a killed run left half written.

        Raises ValueError for a file of something else, or one that another run writes.
        """
        self.answered: set[str] = set()
        """Ids that have their line."""
        self._file: IO[bytes] = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(path)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"--output {str(path)!r} is written by another run already") from error
        except BaseException:
            self._file.close()
            raise

    def append(self, custom_id: str, answer: Mapping[str, Any]) -> None:
        """Writes one answer."""
        assert custom_id not in self.answered, custom_id
        self._file.write(json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        self.answered.add(custom_id)

    def close(self) -> None:
        """Afterwards all lines are on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _read(self, path: Path) -> None:
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                self.answered.add(json.loads(line)["custom_id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--output {str(path)!r} must have answers of a batch, line {number} is none"
                ) from error
        self._file.truncate(whole)


class Batch:
    """Runs requests of a batch on an engine."""

    def __init__(self, engine: "Engine", config: Config) -> None:
        self._engine = engine
        self._config = config
        self._name = config.server.model_name or config.target.model
        self._model = engine.describe()
        self._names = TokenNames(self._model)

    async def run(
        self, requests: Mapping[str, Mapping[str, Any]], output: Output, done: Callable[[bool], None]
    ) -> None:
        """Answers what has no line in `output`, `server.max_concurrent` at a time.

        `done` hears of each, whether it was answered or refused. Raises EngineError when the engine is gone; what has
        its line by then keeps it.
        """
        missing = iter([item for item in requests.items() if item[0] not in output.answered])

        async def work() -> None:
            for custom_id, request in missing:
                status, body = await self._answer(request)
                while status == 429:
                    await asyncio.sleep(self._config.server.retry_after_s)
                    status, body = await self._answer(request)
                output.append(custom_id, _line(custom_id, status, body))
                done(status == 200)

        async with _errors_alone(), asyncio.TaskGroup() as group:
            for _ in range(self._config.server.max_concurrent):
                group.create_task(work())

    async def _answer(self, request: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """HTTP status and body, as the server would answer."""
        fields = ("prompt", "")
        try:
            job, writer = self._job(request)
            fields, tally = (job.prompt_field, job.format_field), Tally(job)
            with contextlib.closing(Answers(self._engine, job.requests)) as answers:
                return 200, await whole_answer(answers, job, writer, tally, tally.add)
        except ValueError as error:
            refused = of_engine(error, *fields)
        except ApiError as error:
            refused = error
        return refused.status, refused.body()

    def _job(self, request: Mapping[str, Any]) -> tuple[Job, Writer]:
        url, body = request.get("url"), request.get("body")
        if url not in _URLS or request.get("method", "POST") != "POST":
            raise ApiError(400, f"url must be {' or '.join(_URLS)}, and method POST", "url", "invalid_url")
        unknown = request.keys() - {"custom_id", "method", "url", "body"}
        if unknown:
            raise ApiError(400, f"unknown field {min(unknown)}", min(unknown), "unknown_parameter")
        try:
            if url == _URLS[0]:
                chat = ChatRequest.model_validate(body)
                self._check(chat)
                job = chat_job(chat, self._config, self._model)
                return job, ChatWriter(job, self._name, self._names)
            completion = CompletionRequest.model_validate(body)
            self._check(completion)
            job = completion_job(completion, self._config, self._names.decode)
            return job, CompletionWriter(job, self._name, self._names)
        except ValidationError as error:
            raise of_validation(error.errors()) from error

    def _check(self, body: Generation) -> None:
        check_model(body.model, self._name)
        if body.stream:
            raise ApiError(400, "stream must be false in a batch", "stream", "unsupported_parameter")


@contextlib.asynccontextmanager
async def _errors_alone() -> Any:
    """What a task group raises, as the one error that it is about."""
    try:
        yield
    except BaseExceptionGroup as group:
        engine, _ = group.split(EngineError)
        raise (engine or group).exceptions[0] from None


def _line(custom_id: str, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    unique = uuid.uuid4().hex
    response = {"status_code": status, "request_id": unique, "body": body}
    return {"id": f"batch_req_{unique}", "custom_id": custom_id, "response": response, "error": None}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input must be a file of text, got {str(path)!r}: {error}") from error
