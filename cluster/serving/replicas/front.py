"""The one address of several replicas: reads a request whole, so that it can be sent where its prompt is known, and
passes on what the replica answers."""

import asyncio
import logging
from collections.abc import AsyncIterable, Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.routing import Router

from outrider.cluster.serving.errors import ApiError
from outrider.cluster.serving.gate import App, Gate, Message, Receive, Scope, Send, visit_of
from outrider.cluster.serving.limits import ApiKeys
from outrider.cluster.serving.metrics import ServerMetrics
from outrider.cluster.serving.replicas.forwarded import REPLICA_HEADER, Forwarded
from outrider.cluster.serving.replicas.metrics import CONTENT_TYPE, Page, merged
from outrider.cluster.serving.replicas.prefixes import prefix_of
from outrider.cluster.serving.response import while_there
from outrider.cluster.serving.server import log_to_stderr
from outrider.configs.loader import load_config
from outrider.configs.schema import ServerConfig

_LATE_S = 5.0  # a replica keeps `server.max_request_s` itself, and says so
_METRICS_S = 30.0
# What an application of ours reads; the rest of a scope is the server's, and stays in its process.
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
_ADDRESSES = ("client", "server")

_log = logging.getLogger("outrider.server")


class Front:
    """A deployment of Ray Serve without models; `replicas` does the work."""

    def __init__(self, config: str, replicas: DeploymentHandle) -> None:
        """config: a file or a preset, as for `outrider serve`."""
        self._config = load_config(config)
        self._replicas = replicas
        log_to_stderr()

    def __serve_build_asgi_app__(self) -> App:
        name = self._config.server.model_name or self._config.target.model
        metrics = ServerMetrics(name)
        forward = _Forward(self._replicas, self._config.server, metrics)
        keys = ApiKeys(self._config.server.api_keys_file)
        # Starlette's router answers what else a server asks of an application: its lifespan.
        return _unnamed(Gate(Router(default=forward), self._config.server, keys, metrics))


class _Forward:
    """The ASGI application: bodies come whole, errors go to the Gate."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig, metrics: ServerMetrics) -> None:
        self._replicas = replicas
        self._streaming = replicas.options(stream=True)
        self._config = config
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        visit = visit_of(scope)
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        prefix = prefix_of(scope["path"], message["body"])
        request = Forwarded(_plain(scope, visit.id), message["body"], prefix)
        if (scope["method"], scope["path"]) == ("GET", "/metrics"):
            await (await self._all_metrics(request))(scope, receive, send)
            return
        relay = _Relay(send)
        try:
            async with asyncio.timeout_at(visit.limit_s(self._config.max_request_s) + _LATE_S):
                await while_there(receive, self._run(request, relay))
        except TimeoutError:
            relay.fail(ApiError(503, "no replica answered in time (server.max_request_s)", code="timeout"))
        except (RayActorError, DeploymentUnavailableError) as error:
            _log.warning("%s: a replica was lost: %s", visit.id, error)
            relay.fail(ApiError(503, "a replica was lost: send the request again", code="engine_unavailable"))
        finally:
            visit.noted["replica"] = relay.replica

    async def _run(self, request: Forwarded, relay: "_Relay") -> None:
        for is_last in (False, True):
            answer: Any = self._streaming.answer.remote(request)
            try:
                await relay.run(answer)
                return
            except RayActorError:
                # Nothing was delivered, and any replica gives the same answer; but what ends them must not end all.
                if relay.started or is_last:
                    raise
            finally:
                answer.cancel()

    async def _all_metrics(self, request: Forwarded) -> Response:
        asked = self._replicas.broadcast("whole", request)
        try:
            answers = await asked.results_async(timeout_s=_METRICS_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError) as error:
            raise ApiError(503, f"replicas do not answer: {error}", code="engine_unavailable") from error
        pages = [page for page in map(_page, answers) if page is not None]
        content = merged(pages, self._metrics.render({}).decode())
        return Response(content, headers={"content-type": CONTENT_TYPE})


def _unnamed(app: App) -> App:
    """An application whose answers do not say the request's id: Serve's proxy, which gave it, does."""

    async def unnamed(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await app(scope, receive, send_unnamed)

    return unnamed


class _Relay:
    """What a replica says, to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.replica = ""

    async def run(self, answer: AsyncIterable[list[Message]]) -> None:
        """Until the replica has said all."""
        async for messages in answer:
            for message in messages:
                if message["type"] == "http.response.start":
                    self.started = True
                    self.replica = _header(message, REPLICA_HEADER)
                await self._send(message)

    def fail(self, error: ApiError) -> None:
        """Raises the error: as an answer, or, where one has begun, as a connection that breaks off."""
        if self.started:
            raise ConnectionError(str(error))
        raise error


def _plain(scope: Scope, request_id: str) -> dict[str, Any]:
    """Of a scope what travels."""
    known = {name: scope[name] for name in _SCOPE if name in scope}
    addresses = {name: tuple(scope[name]) for name in _ADDRESSES if scope.get(name)}
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"] if name != b"x-request-id"]
    return {**known, **addresses, "headers": [*headers, (b"x-request-id", request_id.encode())]}


def _page(answer: "Sequence[Message] | BaseException") -> Page | None:
    """The metrics of a replica; nothing of one that does not answer."""
    if isinstance(answer, BaseException):
        _log.warning("a replica does not tell its metrics: %s", answer)
        return None
    start, *rest = answer
    if start["status"] != 200:
        return None
    return Page(
        _header(start, REPLICA_HEADER), b"".join(message.get("body", b"") for message in rest).decode()
    )


def _header(start: Message, name: bytes) -> str:
    value: bytes = dict(start["headers"])[name]
    return value.decode()
