"""`AsyncClient`: as `Client`, for event loops. A task that is cancelled cancels its request."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType

import httpx

from outrider.cluster.client.answers import Answer, Part, RefusedError, UnavailableError
from outrider.cluster.client.calls import (
    Attempts,
    Call,
    StreamReader,
    error_of,
    generation,
    read_answer,
    tokenization,
)
from outrider.cluster.client.client import (
    CONNECT_S,
    DEFAULT_TIMEOUT_S,
    headers_of,
    key_of,
    limits_of,
    no_limits,
    unreached,
)
from outrider.cluster.client.options import BatchEntry, Messages, Options, Prompt, check_messages, entry_parts
from outrider.cluster.client.ray_address import server_url


class AsyncClient:
    """A server of `outrider serve`, for one event loop. Arguments and errors are those of `Client`."""

    def __init__(
        self,
        url: str,
        api_key: str = "",
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = 3,
    ) -> None:
        Attempts(max_retries, timeout_s)  # with its errors
        self.url = server_url(url)
        self._model = model
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers_of(api_key), limits=no_limits())

    async def generate(self, prompt: Prompt, options: Options | None = None) -> Answer:
        """Continues a text or tokens, or answers messages."""
        call = generation(prompt, options, self._model, stream=False)
        return read_answer((await self._post(call)).json())

    async def chat(self, messages: Messages, options: Options | None = None) -> Answer:
        """Answers messages, `{"role": ..., "content": ...}`."""
        check_messages(messages)
        return await self.generate(messages, options)

    def stream(self, prompt: Prompt, options: Options | None = None) -> "AsyncStream":
        """As `generate`; the answer comes in parts."""
        call = generation(prompt, options, self._model, stream=True)
        return AsyncStream(self._http, call, Attempts(self._max_retries, self._timeout_s))

    async def batch(
        self, entries: Sequence[BatchEntry], concurrency: int = 16
    ) -> list[Answer | RefusedError | UnavailableError]:
        """Runs requests, so many at a time; answers stand in their order, and an error where one failed."""
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")

        places = asyncio.Semaphore(concurrency)

        async def run(entry: BatchEntry) -> Answer | RefusedError | UnavailableError:
            async with places:
                try:
                    return await self.generate(*entry_parts(entry))
                except (RefusedError, UnavailableError) as error:
                    return error

        return await asyncio.gather(*map(run, entries))

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """The tokens that a text or messages come to."""
        tokens: list[int] = (await self._post(tokenization(prompt))).json()["tokens"]
        return tokens

    async def models(self) -> list[str]:
        """Names of what is served."""
        try:
            response = await self._http.get("/v1/models", timeout=CONNECT_S)
        except httpx.TransportError as error:
            raise unreached(error) from error
        if response.status_code != 200:
            raise error_of(response.status_code, response.content)
        return [model["id"] for model in response.json()["data"]]

    async def close(self) -> None:
        """Ends the connections, and with them what is under way."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _post(self, call: Call) -> httpx.Response:
        attempts = Attempts(self._max_retries, self._timeout_s)
        while True:
            retry_after = ""
            try:
                response = await self._http.post(
                    call.path, json=call.body, headers=key_of(call), timeout=limits_of(attempts.remaining_s())
                )
                if response.status_code == 200:
                    return response
                failure = error_of(response.status_code, response.content)
                retry_after = response.headers.get("retry-after", "")
            except httpx.TransportError as error:
                failure = unreached(error)
            await asyncio.sleep(attempts.delay_s(failure, retry_after))


class AsyncStream(AsyncIterator[Part]):
    """The parts of one answer as they come. Closed, left or dropped before its end, it cancels the request.

    A connection that breaks is taken up where it broke.
    """

    def __init__(self, http: httpx.AsyncClient, call: Call, attempts: Attempts) -> None:
        self._reader = StreamReader()
        self._parts = self._read(http, call, attempts)

    async def __anext__(self) -> Part:
        return await anext(self._parts)

    async def close(self) -> None:
        """Cancels the request unless it has ended. May be called again."""
        await self._parts.aclose()

    def answer(self) -> Answer:
        """All that has come; whole once the iterator has ended."""
        return self._reader.answer()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _read(
        self, http: httpx.AsyncClient, call: Call, attempts: Attempts
    ) -> AsyncGenerator[Part, None]:
        while not self._reader.ended:
            retry_after = ""
            try:
                self._reader.begin()
                limits = limits_of(attempts.remaining_s())
                async with http.stream(
                    "POST", call.path, json=call.body, headers=key_of(call), timeout=limits
                ) as response:
                    if response.status_code != 200:
                        retry_after = response.headers.get("retry-after", "")
                        raise error_of(response.status_code, await response.aread())
                    async for line in response.aiter_lines():
                        for part in self._reader.read(line):
                            yield part
                        attempts.remaining_s()
                if self._reader.ended:
                    return
                failure: Exception = UnavailableError("the stream ended before the answer did")
            except httpx.TransportError as error:
                failure = unreached(error)
            except UnavailableError as error:
                failure = error
            await asyncio.sleep(attempts.delay_s(failure, retry_after))
