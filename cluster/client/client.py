"""`Client`: a running server from Python, without torch and without Ray.

with Client("http://127.0.0.1:8000") as client:
    for part in client.stream("A lighthouse is", {"temperature": 0.7, "seed": 1}):
        print(part.text, end="")
"""

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from outrider.cluster.client.options import BatchEntry, Messages, Options, Prompt, check_messages, entry_parts
from outrider.cluster.client.ray_address import server_url

DEFAULT_TIMEOUT_S = 600.0
CONNECT_S = 10.0


class Client:
    """A server of `outrider serve`. May be used from several threads.

    url: as the server prints it, with or without `/v1`, or its host:port; or the address of the Ray cluster that it
    runs in (`auto`, host:port, or ray://host:port), where this process then joins for a moment. api_key: if the
    server wants one. model: the name to ask for, empty: whatever is served. timeout_s: for one answer, all attempts
    together. max_retries: attempts after the first, where the server was not reached, had no place or failed.

    All calls raise RefusedError (a ValueError) for a request that cannot be run, UnavailableError otherwise.
    """

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
        self._http = httpx.Client(base_url=self.url, headers=headers_of(api_key), limits=no_limits())

    def generate(self, prompt: Prompt, options: Options | None = None) -> Answer:
        """Continues a text or tokens, or answers messages."""
        call = generation(prompt, options, self._model, stream=False)
        return read_answer(self._post(call).json())

    def chat(self, messages: Messages, options: Options | None = None) -> Answer:
        """Answers messages, `{"role": ..., "content": ...}`."""
        check_messages(messages)
        return self.generate(messages, options)

    def stream(self, prompt: Prompt, options: Options | None = None) -> "Stream":
        """As `generate`; the answer comes in parts."""
        call = generation(prompt, options, self._model, stream=True)
        return Stream(self._http, call, Attempts(self._max_retries, self._timeout_s))

    def batch(
        self, entries: Sequence[BatchEntry], concurrency: int = 16
    ) -> list[Answer | RefusedError | UnavailableError]:
        """Runs requests, so many at a time; answers stand in their order, and an error where one failed."""
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")

        def run(entry: BatchEntry) -> Answer | RefusedError | UnavailableError:
            try:
                return self.generate(*entry_parts(entry))
            except (RefusedError, UnavailableError) as error:
                return error

        with ThreadPoolExecutor(concurrency) as threads:
            return list(threads.map(run, entries))

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The tokens that a text or messages come to."""
        tokens: list[int] = self._post(tokenization(prompt)).json()["tokens"]
        return tokens

    def models(self) -> list[str]:
        """Names of what is served."""
        try:
            response = self._http.get("/v1/models", timeout=CONNECT_S)
        except httpx.TransportError as error:
            raise unreached(error) from error
        if response.status_code != 200:
            raise error_of(response.status_code, response.content)
        return [model["id"] for model in response.json()["data"]]

    def close(self) -> None:
        """Ends the connections, and with them what is under way."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _post(self, call: Call) -> httpx.Response:
        attempts = Attempts(self._max_retries, self._timeout_s)
        while True:
            retry_after = ""
            try:
                response = self._http.post(
                    call.path, json=call.body, headers=key_of(call), timeout=limits_of(attempts.remaining_s())
                )
                if response.status_code == 200:
                    return response
                failure = error_of(response.status_code, response.content)
                retry_after = response.headers.get("retry-after", "")
            except httpx.TransportError as error:
                failure = unreached(error)
            time.sleep(attempts.delay_s(failure, retry_after))


class Stream(Iterator[Part]):
    """The parts of one answer as they come. Closed, left or dropped before its end, it cancels the request.

    A connection that breaks is taken up where it broke.
    """

    def __init__(self, http: httpx.Client, call: Call, attempts: Attempts) -> None:
        self._reader = StreamReader()
        self._parts = self._read(http, call, attempts)

    def __next__(self) -> Part:
        return next(self._parts)

    def close(self) -> None:
        """Cancels the request unless it has ended. May be called again."""
        self._parts.close()

    def answer(self) -> Answer:
        """All that has come; whole once the iterator has ended."""
        return self._reader.answer()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, http: httpx.Client, call: Call, attempts: Attempts) -> Generator[Part, None, None]:
        while not self._reader.ended:
            retry_after = ""
            try:
                self._reader.begin()
                limits = limits_of(attempts.remaining_s())
                with http.stream(
                    "POST", call.path, json=call.body, headers=key_of(call), timeout=limits
                ) as response:
                    if response.status_code != 200:
                        retry_after = response.headers.get("retry-after", "")
                        raise error_of(response.status_code, response.read())
                    for line in response.iter_lines():
                        yield from self._reader.read(line)
                        attempts.remaining_s()
                if self._reader.ended:
                    return
                failure: Exception = UnavailableError("the stream ended before the answer did")
            except httpx.TransportError as error:
                failure = unreached(error)
            except UnavailableError as error:
                failure = error
            time.sleep(attempts.delay_s(failure, retry_after))


def headers_of(api_key: str) -> dict[str, str]:
    """What every request carries."""
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def key_of(call: Call) -> dict[str, str]:
    """Names a request across its attempts."""
    return {"idempotency-key": call.key}


def no_limits() -> httpx.Limits:
    """As many connections as there are requests: the server says how many it takes."""
    return httpx.Limits(max_connections=None, max_keepalive_connections=64)


def limits_of(remaining_s: float) -> httpx.Timeout:
    """Of one attempt."""
    return httpx.Timeout(remaining_s, connect=min(CONNECT_S, remaining_s))


def unreached(error: httpx.TransportError) -> UnavailableError:
    """What a broken connection is to the user."""
    return UnavailableError(f"the server was not reached: {type(error).__name__}: {error}".rstrip(": "))
