"""A replica: a deployment of its own, and the HTTP application in front of it, in Ray Serve."""

import asyncio
import logging
from collections.abc import AsyncIterator

from ray import serve

from outrider.cluster.api import EngineError
from outrider.cluster.engine import Engine
from outrider.cluster.serving.app import create_app
from outrider.cluster.serving.gate import Message
from outrider.cluster.serving.limits import ApiKeys
from outrider.cluster.serving.replicas.forwarded import REPLICA_HEADER, Forwarded
from outrider.cluster.serving.server import log_to_stderr
from outrider.configs.loader import load_config


class Replica:
    """Serve waits for as long as models load; a replica whose deployment broke is replaced. One that is no longer
    wanted gets no more requests, and ends when it has answered those it has."""

    def __init__(self, config: str) -> None:
        """config: a file or a preset, as for `outrider serve`; `server.host` and `server.port` are Serve's."""
        self._config = load_config(config)
        ApiKeys(self._config.server.api_keys_file)  # a bad file is known before models are loaded
        log_to_stderr()
        self._engine = Engine.start(self._config)
        self._app = create_app(self._engine, self._config)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """The messages of an ASGI application for a request, as they come, those that are there together. Who stops
        listening has left."""
        said: list[Message] = []
        news = asyncio.Event()
        body = [request.body]

        async def receive() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await asyncio.Event().wait()  # whoever leaves cancels the answer
            raise AssertionError

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REPLICA_HEADER, self._name)]
            said.append(message)
            news.set()

        running = asyncio.ensure_future(self._app(request.scope, receive, send))
        running.add_done_callback(lambda _: news.set())
        try:
            while not running.done() or said:
                await news.wait()
                news.clear()
                if said:
                    messages, said[:] = list(said), []
                    yield messages
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def whole(self, request: Forwarded) -> list[Message]:
        """All messages of an answer."""
        return [message async for messages in self.answer(request) for message in messages]

    def check_health(self) -> None:
        """Serve asks every few seconds. Raises EngineError."""
        if self._engine.failure:
            logging.getLogger("outrider").error(self._engine.failure)
            raise EngineError(self._engine.failure)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
