"""What every request passes before anything else: who sends it, how large it is, how long it may take, its id."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from outrider.cluster.serving.errors import ApiError
from outrider.cluster.serving.limits import ApiKeys, byte_places
from outrider.cluster.serving.metrics import ServerMetrics
from outrider.configs.schema import ServerConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WITHOUT_KEY = ("/", "/health", "/ready")
_MAX_ID = 128  # characters of a request's id that a client chose

_log = logging.getLogger("outrider.server")


class Gate:
    """An ASGI application around another one, which gets whole bodies."""

    def __init__(self, app: App, config: ServerConfig, keys: ApiKeys, metrics: ServerMetrics) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._metrics = metrics
        self._bytes = byte_places(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        try:
            await self._pass(scope, receive, visit)
        except ApiError as error:
            await visit.refuse(error, self._config.retry_after_s)
        finally:
            if visit.status >= 400:
                self._metrics.refused(visit.status)
            visit.log()

    async def _pass(self, scope: Scope, receive: Receive, visit: "_Visit") -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in WITHOUT_KEY:
            self._keys.check(headers.get(b"authorization", b""))
        limit = self._config.max_body_bytes
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limit:
            raise _too_large(limit)
        body, num_bytes = [], 0
        try:
            async with asyncio.timeout_at(visit.limit_s(self._config.max_request_s)):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    part = message.get("body", b"")
                    self._bytes.take(len(part))
                    num_bytes += len(part)
                    if num_bytes > limit:
                        raise _too_large(limit)
                    body.append(part)
                    more = message.get("more_body", False)
            await self._app(scope, _replay(b"".join(body), receive), visit.send)
        except TimeoutError:
            # Answers have the same limit and say so themselves.
            raise ApiError(
                408, "the body did not come in time (server.max_request_s)", code="timeout"
            ) from None
        finally:
            self._bytes.give_back(num_bytes)


class _Visit:
    """One request: its id, its answer's status, and the line about it in the log."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._begin_s = time.monotonic()
        self.status = 0
        chosen = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        usable = chosen.isascii() and chosen.isprintable() and 0 < len(chosen) <= _MAX_ID
        self.id = chosen if usable else uuid.uuid4().hex
        self.noted: dict[str, Any] = {}
        scope.setdefault("state", {})["visit"] = self

    def limit_s(self, max_request_s: float) -> float:
        """When the request must have ended, by the event loop's clock."""
        return asyncio.get_running_loop().time() - (time.monotonic() - self._begin_s) + max_request_s

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        await self._send(message)

    async def refuse(self, error: ApiError, retry_after_s: int) -> None:
        """The answer to a request that got no further."""
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [
            (name.encode(), value.encode()) for name, value in extra_headers(error, retry_after_s).items()
        ]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        """A line of JSON."""
        line = {
            "request_id": self.id,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status,
            "duration_s": round(time.monotonic() - self._begin_s, 4),
            **self.noted,
        }
        _log.info(json.dumps(line, ensure_ascii=True))


def visit_of(scope: Scope) -> _Visit:
    """The request that this scope belongs to."""
    visit = scope["state"]["visit"]
    assert isinstance(visit, _Visit)
    return visit


def extra_headers(error: ApiError, retry_after_s: int) -> dict[str, str]:
    """Headers that go with an error."""
    if error.status == 429:
        return {"retry-after": str(retry_after_s)}
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    # Its body was not read to the end.
    return {"connection": "close"} if error.status in (408, 413) else {}


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"a body must be at most {limit} bytes (server.max_body_bytes)", code="body_too_large"
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, then whatever comes."""
    rest = [body]

    async def replayed() -> Message:
        if rest:
            return {"type": "http.request", "body": rest.pop(), "more_body": False}
        return await receive()

    return replayed
