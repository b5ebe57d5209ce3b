"""The clients against a server from a script: what is sent, what is tried again, how a broken stream goes on."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from outrider.cluster.client import async_client, client, ray_address
from outrider.cluster.client.answers import RefusedError, Tree, UnavailableError, read_part
from outrider.cluster.client.async_client import AsyncClient
from outrider.cluster.client.client import Client

ANSWER = {
    "id": "cmpl-1",
    "model": "m",
    "choices": [
        {
            "text": "Hi",
            "finish_reason": "stop",
            "logprobs": None,
            "speculative": {
                "segments": [{"text": "Hi", "origin": "draft"}],
                "token_ids": [7],
                "token_origins": ["draft"],
                "tree": {"token_ids": [3, 7], "tokens": ["!", "Hi"], "parents": [0, 0], "accepted": [1]},
            },
        }
    ],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "speculative": {"rounds": 1, "drafted": 4, "accepted": 1, "kept": 0},
    },
}
REFUSED = {"error": {"message": "seed must be small", "type": "t", "param": "seed", "code": "invalid_value"}}

Reply = Callable[[httpx.Request], httpx.Response]


def chunk(text: str, tokens: Sequence[int], reason: str | None = None) -> dict[str, Any]:
    said = {
        "segments": [{"text": text, "origin": "target"}] if text else [],
        "token_ids": tokens,
        "token_origins": ["target"] * len(tokens),
    }
    return {"id": "c", "model": "m", "choices": [{"speculative": said, "finish_reason": reason}]}


def stream_of(*chunks: dict[str, Any], breaks: bool = False) -> httpx.Response:
    def lines() -> Iterator[bytes]:
        for content in chunks:
            yield b"data: " + json.dumps(content).encode() + b"\n\n"
        if breaks:
            raise httpx.ReadError("connection reset")
        yield b"data: [DONE]\n\n"

    class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return lines()

        async def __aiter__(self) -> Any:
            for line in lines():
                yield line

    return httpx.Response(200, stream=Body())


class Script:
    """Replies in turn, and remembers what was asked and how long the client waited."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []
        self.waits_s: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    @property
    def keys(self) -> set[str]:
        return {request.headers["idempotency-key"] for request in self.requests}


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask(script, call)`: the result of `call(client)`; a stream becomes the list of its texts and its answer."""

    def run(script: Script, call: Callable[[Any], Any], **arguments: Any) -> Any:
        transport = httpx.MockTransport(script)
        if request.param == "sync":
            monkeypatch.setattr(client.time, "sleep", script.waits_s.append)
            plain = Client("http://server", **arguments)
            plain._http = httpx.Client(transport=transport, base_url="http://server")
            result = call(plain)
            return ([part.text for part in result], result.answer()) if hasattr(result, "answer") else result

        async def wait(delay_s: float) -> None:
            script.waits_s.append(delay_s)

        async def main() -> Any:
            ours = AsyncClient("http://server", **arguments)
            ours._http = httpx.AsyncClient(transport=transport, base_url="http://server")
            result = call(ours)
            if hasattr(result, "answer"):
                return [part.text async for part in result], result.answer()
            return await result

        monkeypatch.setattr(async_client.asyncio, "sleep", wait)
        return asyncio.run(main())

    return run


def test_options_are_sent_as_the_server_reads_them(ask: Ask) -> None:
    script = Script(httpx.Response(200, json=ANSWER))
    options = {
        "seed": 1,
        "stop": ("a",),
        "logit_bias": {5: 1.0},
        "top_logprobs": 2,
        "speculative": {"budget": 0},
    }
    answer = ask(script, lambda c: c.generate([1, 2], options), model="m")
    assert json.loads(script.requests[0].content) == {
        "model": "m",
        "prompt": [1, 2],
        "seed": 1,
        "stop": ["a"],
        "logit_bias": {"5": 1.0},
        "logprobs": 2,
        "speculative": {"budget": 0, "origins": True},
    }
    assert (answer.text, answer.tokens[0].origin, answer.usage.acceptance_rate) == ("Hi", "draft", 0.25)
    plain = Script(httpx.Response(200, json=ANSWER))
    ask(plain, lambda c: c.generate("x", {"speculative": "off"}))
    assert json.loads(plain.requests[0].content)["speculative"] == {"budget": 0, "origins": True}
    with pytest.raises(ValueError, match=r"options must be among max_tokens, .* got heat"):
        ask(script, lambda c: c.generate("x", {"heat": 1}))


def test_the_tree_of_a_round_is_read_where_it_is_told() -> None:
    assert read_part(ANSWER["choices"][0]).tree == Tree((3, 7), ("!", "Hi"), (0, 0), (1,))
    assert read_part(chunk("x", [1])["choices"][0]).tree == Tree()


def test_what_may_go_better_is_tried_again_under_the_same_key(ask: Ask) -> None:
    busy = httpx.Response(429, json=REFUSED, headers={"retry-after": "3"})
    script = Script(httpx.ConnectError("refused"), busy, httpx.Response(502, text="gateway"))
    script.replies.append(httpx.Response(200, json=ANSWER))
    assert ask(script, lambda c: c.generate("x")).text == "Hi"
    assert len(script.requests) == 4
    assert len(script.keys) == 1
    assert script.waits_s[1] >= 3


def test_what_cannot_go_better_is_not(ask: Ask) -> None:
    script = Script(httpx.Response(400, json=REFUSED))
    with pytest.raises(RefusedError, match="seed must be small") as refused:
        ask(script, lambda c: c.generate("x"))
    assert (refused.value.param, refused.value.status) == ("seed", 400)
    script = Script(*[httpx.Response(503, text="down")] * 3)
    with pytest.raises(UnavailableError, match="the server answered 503: down"):
        ask(script, lambda c: c.generate("x"), max_retries=2)
    script = Script(httpx.ConnectError("connection refused"))
    with pytest.raises(UnavailableError, match="not reached: ConnectError: connection refused"):
        ask(script, lambda c: c.models())
    # Waiting would take longer than there is time for.
    script = Script(httpx.Response(429, json=REFUSED, headers={"retry-after": "60"}))
    with pytest.raises(UnavailableError, match="429"):
        ask(script, lambda c: c.generate("x"), timeout_s=5.0)


def test_a_broken_stream_goes_on_where_it_broke(ask: Ask) -> None:
    script = Script(
        stream_of(chunk("one ", [1, 2]), chunk("two ", [3]), breaks=True),
        httpx.ConnectError("refused"),
        stream_of(chunk("one tw", [1, 2]), breaks=True),
        stream_of(chunk("on", [1]), chunk("e two three", [2, 3, 4], "stop")),
    )
    texts, answer = ask(script, lambda c: c.stream("x"))
    assert texts == ["one ", "two ", "three"]
    assert answer.text == "one two three"
    assert [token.id for token in answer.tokens] == [1, 2, 3, 4]
    assert answer.finish_reason == "stop"
    assert len(script.keys) == 1


def test_a_stream_that_ends_too_early_or_says_so_is_taken_up(ask: Ask) -> None:
    failed = {"error": {"message": "target 1 died", "type": "server_error", "param": None, "code": "x"}}
    whole = stream_of(chunk("one", [1], "stop"))
    assert ask(Script(stream_of(chunk("o", []), failed), whole), lambda c: c.stream("x"))[0] == ["o", "ne"]
    with pytest.raises(UnavailableError, match="target 1 died"):
        ask(Script(stream_of(failed)), lambda c: c.stream("x"), max_retries=0)


def test_a_stream_never_goes_on_with_another_text(ask: Ask) -> None:
    script = Script(stream_of(chunk("one ", [1]), breaks=True), stream_of(chunk("uno ", [9])))
    with pytest.raises(UnavailableError, match="got other tokens than before"):
        ask(script, lambda c: c.stream("x"), max_retries=1)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": [[1, 2.0]]}, "logit_bias"),
        ({"speculative": "on"}, "speculative"),
        ({"speculative": None}, "speculative"),
        ({"max_token": 3}, "max_token"),
        ([("max_tokens", 3)], "options"),
    ],
)
def test_options_that_nothing_would_run_are_refused_by_name(ask: Ask, options: Any, param: str) -> None:
    script = Script()
    with pytest.raises(RefusedError, match=param) as refused:
        ask(script, lambda c: c.generate("x", options))
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert not script.requests


@pytest.mark.parametrize(
    "prompt", [["a", "b"], None, b"ab", {"role": "user", "content": "x"}, [1.5], [True], 5]
)
def test_what_is_no_prompt_is_refused(ask: Ask, prompt: Any) -> None:
    for call in (lambda c: c.generate(prompt), lambda c: c.chat(prompt), lambda c: c.tokenize(prompt)):
        with pytest.raises(
            RefusedError, match="prompt must be a text, a list of messages or a list of token"
        ):
            ask(Script(), call)


def test_arrays_and_numbers_of_numpy_are_numbers(ask: Ask) -> None:
    script = Script(httpx.Response(200, json=ANSWER))
    ask(script, lambda c: c.generate(np.array([1, 2]), {"temperature": np.float64(0.5)}))
    sent = json.loads(script.requests[0].content)
    assert (sent["prompt"], sent["temperature"]) == ([1, 2], 0.5)


def test_chat_wants_messages(ask: Ask) -> None:
    for prompt in ("hi", [1, 2]):
        with pytest.raises(RefusedError, match="messages must be a list of messages, got") as refused:
            ask(Script(), lambda c, prompt=prompt: c.chat(prompt))
        assert refused.value.param == "messages"
    with pytest.raises(RefusedError, match="prompt must be a text or a list of messages, got token ids"):
        ask(Script(), lambda c: c.tokenize([1, 2]))


def test_a_bad_entry_of_a_batch_fails_alone(ask: Ask) -> None:
    bad: list[Any] = [{"promt": "a"}, "a", {"prompt": "a", "options": {"heat": 1}}, {"prompt": ["a", "b"]}]
    script = Script(httpx.Response(200, json=ANSWER))
    *refused, answer = ask(script, lambda c: c.batch([*bad, {"prompt": "a"}], concurrency=1))
    assert answer.text == "Hi"
    assert all(isinstance(error, RefusedError) for error in refused)
    assert [error.param for error in refused] == ["prompt", "prompt", "heat", "prompt"]


def test_what_a_client_is_made_with_is_looked_at(ask: Ask) -> None:
    for arguments, message in (
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
        ({"timeout_s": 0}, "timeout_s must be a number of seconds above 0, got 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be a number of seconds above 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(Script(), lambda c: c.models(), **arguments)
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        ask(Script(), lambda c: c.batch([], concurrency=0))


def test_where_a_server_is_may_be_said_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get(url: str, timeout: float) -> httpx.Response:
        asked.append(url)
        if "gcs" in url:
            raise httpx.RemoteProtocolError("no HTTP")
        return httpx.Response(404 if "dashboard" in url else 401)

    monkeypatch.setattr(ray_address.httpx, "get", get)
    monkeypatch.setattr(ray_address, "server_at", lambda address: f"http://found-by-{address}")
    places = ("http://h:8000", "http://h:8000/", "http://h:8000/v1", "https://h/a/v1/", "h.org:8000")
    assert [ray_address.server_url(place) for place in places] == [
        "http://h:8000",
        "http://h:8000",
        "http://h:8000",
        "https://h/a",
        "http://h.org:8000",
    ]
    assert asked == ["http://h.org:8000/v1/models"]
    for cluster in ("auto", "ray://h:10001", "gcs:6379", "dashboard:8265"):
        assert ray_address.server_url(cluster) == f"http://found-by-{cluster}"
