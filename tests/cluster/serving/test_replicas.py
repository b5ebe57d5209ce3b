"""Several replicas behind a front, without Ray: where requests go, and what of an answer passes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import ActorDiedError
from starlette.testclient import TestClient
from typer.testing import CliRunner

from outrider.cluster.api import EngineError
from outrider.cluster.cli.main import app as cli
from outrider.cluster.engine import Engine
from outrider.cluster.serving.ray_serve import application
from outrider.cluster.serving.replicas.forwarded import Forwarded
from outrider.cluster.serving.replicas.front import Front
from outrider.cluster.serving.replicas.prefixes import BLOCK, PrefixTable, prefix_of, ranked
from outrider.cluster.serving.replicas.replica import Replica
from outrider.cluster.serving.replicas.router import PrefixRouter
from outrider.configs.loader import config_from_dict, config_to_yaml, load_config
from support.fake_workers import FAKE_CONFIG
from support.posted_engine import PostedEngine, posted_engine
from support.waiting import until

ASKED = {"prompt": "one two three", "max_tokens": 5}


class LocalReplicas:
    """As a handle of Ray Serve's, over replicas of this process: each request goes to the next of them."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self.sent: list[Forwarded] = []
        self.answer = SimpleNamespace(remote=self._answer)

    def options(self, stream: bool) -> "LocalReplicas":
        assert stream
        return self

    def broadcast(self, method: str, request: Forwarded) -> SimpleNamespace:
        async def results(timeout_s: float, return_exceptions: bool) -> list[Any]:
            calls = [getattr(replica, method)(request) for replica in self.replicas]
            return await asyncio.gather(*calls, return_exceptions=return_exceptions)

        return SimpleNamespace(results_async=results)

    def _answer(self, request: Forwarded) -> "_Answer":
        self.sent.append(request)
        return _Answer(self.replicas[(len(self.sent) - 1) % len(self.replicas)].answer(request))


class _Answer:
    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._messages.aclose())  # type: ignore[attr-defined]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "outrider.yaml"
    path.write_text(config_to_yaml(FAKE_CONFIG))
    return str(path)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch, config: str) -> Iterator[LocalReplicas]:
    with ExitStack() as stack:
        engines = [stack.enter_context(posted_engine(str.upper)) for _ in range(2)]
        made = []
        for number, engine in enumerate(engines):
            context = SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"r{number}"))
            monkeypatch.setattr(serve, "get_replica_context", lambda context=context: context)
            monkeypatch.setattr(Engine, "start", lambda config, engine=engine: engine)
            made.append(Replica(config))
        yield LocalReplicas(made)


@pytest.fixture
def app(replicas: LocalReplicas, config: str) -> Any:
    return Front(config, replicas).__serve_build_asgi_app__()  # type: ignore[arg-type]


def engine_of(replica: Replica) -> PostedEngine:
    engine: Any = replica._engine
    return engine


def in_messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def chat(*texts: str) -> bytes:
    return json.dumps({"messages": in_messages(*texts)}).encode()


def test_prompts_that_begin_alike_have_a_prefix_in_common() -> None:
    def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
        return next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), -1)

    path = "/v1/chat/completions"
    turn, longer = prefix_of(path, chat("a" * 300)), prefix_of(path, chat("a" * 300, "b" * 300))
    assert len(turn) == 5
    assert len(longer) > 9
    assert longer[:5] == turn
    assert common(prefix_of(path, chat("a" * 300 + "x")), prefix_of(path, chat("a" * 300 + "y"))) == -1
    # The same block behind another beginning is another.
    ends = [prefix_of("/v1/completions", json.dumps({"prompt": c + "z" * 200}).encode()) for c in "pq"]
    assert set(ends[0]).isdisjoint(ends[1])
    tools = {"messages": in_messages("a" * 300), "tools": [{"type": "function"}]}
    assert set(prefix_of(path, json.dumps(tools).encode())).isdisjoint(turn)
    tokens = list(range(100))
    one = prefix_of("/v1/completions", json.dumps({"prompt": tokens}).encode())
    assert one == prefix_of("/v1/completions", json.dumps({"prompt": [tokens, [5]]}).encode()) != ()
    said = {"instructions": "i" * 100, "input": "x" * 100}
    assert len(prefix_of("/v1/responses", json.dumps(said).encode())) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff",
        b"[" * 100000,
        b'{"prompt": []}',
        b'{"prompt": "short"}',
        b'{"prompt": 5}',
    ],
)
def test_what_has_no_beginning_has_no_prefix(body: bytes) -> None:
    assert prefix_of("/v1/completions", body) == ()
    assert prefix_of("/health", body) == ()


def test_half_of_a_surrogate_pair_has_a_prefix_too() -> None:
    assert prefix_of("/v1/completions", b'{"prompt": "' + b"\\ud800" * BLOCK + b'"}')


def test_a_table_forgets_the_longest_beginnings_of_what_was_asked_for_longest_ago() -> None:
    table = PrefixTable(4)
    table.add((1, 2, 3))
    assert [table.num_known(prefix) for prefix in ((1, 2, 3, 4), (1, 9, 3), ())] == [3, 1, 0]
    table.add((7, 8))
    assert len(table) == 4
    assert table.num_known((1, 2, 3)) == 2
    table.add((1, 2))  # asked for once more
    table.add((5, 6))
    assert table.num_known((7, 8)) == 0
    assert table.num_known((1, 2)) == 2
    table.add(tuple(range(10, 20)))
    assert table.num_known(tuple(range(10, 20))) == 4


@pytest.mark.parametrize(
    ("num_known", "queues", "sizes", "order"),
    [
        ([0, 3, 5], [0, 0, 0], [0, 0, 0], [2, 1, 0]),  # the longest beginning
        ([0, 3, 5], [0, 2, 2], [0, 0, 0], [2, 1, 0]),  # as long as the queue is no longer than by the lead
        ([0, 3, 5], [0, 2, 3], [0, 0, 0], [1, 0, 2]),  # a long queue diverts, and comes last
        ([0, 0, 0], [2, 1, 1], [0, 9, 4], [2, 1, 0]),  # nothing known: short queues, then small tables
        ([4, 4, 4], [1, 0, 2], [0, 0, 0], [1, 0, 2]),
        ([5, 0], [float("inf"), 1], [0, 0], [1, 0]),  # one that does not say
        ([5, 6], [float("inf"), float("inf")], [0, 0], [1, 0]),
        ([], [], [], []),
    ],
)
def test_the_longest_prefix_goes_first_unless_its_queue_is_clearly_longer(
    num_known: list[int], queues: list[float], sizes: list[int], order: list[int]
) -> None:
    assert ranked(num_known, queues, sizes, queue_lead=2) == order


def test_the_router_offers_a_request_to_who_took_one_like_it() -> None:
    async def scenario() -> None:
        # Ray Serve makes routers in its own processes; what ours adds is all here.
        router: Any = object.__new__(PrefixRouter)
        router.initialize_state(queue_lead=2, prefix_blocks=100)
        lengths: dict[str, int | None] = {"a": 0, "b": None}
        asked = []

        async def probe(replicas: list[Any], attempt: int) -> list[tuple[str, int]]:
            asked.extend(replica.replica_id for replica in replicas)
            return [(replica, 0) for replica in replicas]

        router._replica_queue_len_cache = lengths
        router._probe_queue_lens = probe
        replicas = [SimpleNamespace(replica_id=name) for name in "ab"]

        def pending(*prefix: int) -> Any:
            return SimpleNamespace(args=(Forwarded({}, b"", prefix),), routing_context=SimpleNamespace())

        async def order(request: Any) -> list[str]:
            return [rank[0].replica_id for rank in await router.choose_replicas(replicas, request)]

        router.on_request_routed(pending(1, 2, 3), "b", None)
        request = pending(1, 2, 4)
        assert await order(request) == ["b", "a"]
        assert request.routing_context.should_backoff
        assert asked == ["b"]
        assert await order(pending(9)) == ["a", "b"]
        lengths["b"] = 3
        assert await order(pending(1, 2)) == ["a", "b"]
        assert await order(None) == ["a", "b"]

    asyncio.run(scenario())


def test_the_front_answers_as_a_replica_does(app: Any, replicas: LocalReplicas) -> None:
    with TestClient(app) as client:
        answer = client.post("/v1/completions", json=ASKED, headers={"x-request-id": "mine"})
        assert answer.json()["choices"][0]["text"] == "ONE TWO THREE"[:5]
        assert (b"x-request-id", b"mine") in replicas.sent[0].scope["headers"]
        assert "x-request-id" not in answer.headers  # Serve's proxy says it
        assert answer.headers["x-outrider-replica"] == "r0"
        with client.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        assert streamed.headers["x-outrider-replica"] == "r1"
        assert lines[-1] == "data: [DONE]"
        refused = client.post("/v1/completions", json={**ASKED, "top_p": 2.0})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_p")
        assert client.get("/health").text == "ok"
        assert client.get("/nowhere").status_code == 404
        assert client.post("/v1/completions", content=b"x" * (2**23 + 1)).status_code == 413
    assert all(request.prefix == () for request in replicas.sent)


def test_metrics_are_of_all_replicas_and_errors_are_counted_once(app: Any) -> None:
    client = TestClient(app)
    for _ in range(4):
        client.post("/v1/completions", json=ASKED)
    client.post("/v1/completions", json={**ASKED, "top_p": 2.0})
    samples = [
        (sample.name, sample.labels["replica"], sample.labels.get("finished_reason"), sample.value)
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    ]
    assert {("vllm:request_success_total", replica, "length", 2) for replica in ("r0", "r1")} <= set(samples)
    refused = [sample[1:] for sample in samples if sample[0] == "outrider_refused_requests_total"]
    assert refused == [("front", None, 1)]


def test_a_client_that_leaves_ends_its_request_at_the_replica(
    app: Any, replicas: LocalReplicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        engine, left = engine_of(replicas.replicas[0]), asyncio.Event()
        asked, dropped = asyncio.Event(), []
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(engine, "drop", dropped.append)
        monkeypatch.setattr(engine, "post", lambda request, box: loop.call_soon(asked.set) and "id")
        body = [json.dumps(ASKED).encode()]

        async def receive() -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
        rest: dict[str, Any] = {"query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http"}
        rest["headers"] = [(b"content-type", b"application/json")]
        serving = asyncio.ensure_future(app({**scope, **rest}, receive, send))
        await until(asked.is_set)
        left.set()
        await serving
        await until(lambda: dropped == [["id"]])

    asyncio.run(scenario())


def died(*begun: Any) -> Callable[[Forwarded], AsyncIterator[Any]]:
    async def answer(request: Forwarded) -> AsyncIterator[Any]:
        for messages in begun:
            yield messages
        raise ActorDiedError

    return answer


def test_what_a_lost_replica_did_not_begin_another_answers(app: Any, replicas: LocalReplicas) -> None:
    replicas.replicas[0].answer = died()  # type: ignore[method-assign]
    answer = TestClient(app).post("/v1/completions", json=ASKED)
    assert answer.json()["choices"][0]["text"] == "ONE TWO THREE"[:5]
    assert answer.headers["x-outrider-replica"] == "r1"
    replicas.replicas[1].answer = died()  # type: ignore[method-assign]
    lost = TestClient(app).post("/v1/completions", json=ASKED)
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "engine_unavailable")


def test_a_stream_that_a_lost_replica_began_breaks_off(app: Any, replicas: LocalReplicas) -> None:
    start = {"type": "http.response.start", "status": 200, "headers": [(b"x-outrider-replica", b"r0")]}
    part = {"type": "http.response.body", "body": b"data", "more_body": True}
    replicas.replicas[0].answer = died([start, part])  # type: ignore[method-assign]
    with pytest.raises((httpx.HTTPError, ConnectionError)):
        TestClient(app).post("/v1/completions", json={**ASKED, "stream": True})


def test_a_replica_whose_deployment_broke_says_so(
    replicas: LocalReplicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas.replicas[0].check_health()
    monkeypatch.setattr(PostedEngine, "failure", "target 1 died")
    with pytest.raises(EngineError, match="target 1 died"):
        replicas.replicas[0].check_health()


def test_the_application_wants_a_configuration_and_nothing_else(config: str) -> None:
    assert application({"config": config}) is not None
    with pytest.raises(ValueError, match=r"argument config alone, got \['config', 'port'\]"):
        application({"config": config, "port": "1"})
    with pytest.raises(ValueError, match="config must be a YAML file or one of"):
        application({"config": "nowhere"})


def test_replicas_come_and_go_as_the_configuration_says(tmp_path: Path) -> None:
    path = tmp_path / "outrider.yaml"
    for least, most in ((3, 3), (1, 4)):
        overrides = [f"replicas.min_replicas={least}", f"replicas.max_replicas={most}"]
        path.write_text(config_to_yaml(load_config("tiny-random", overrides)))
        front = application({"config": str(path)})._bound_deployment
        replica = front.init_args[1]._bound_deployment
        assert front.num_replicas == 1
        if least == most:
            assert replica.num_replicas == 3
        else:
            scaling = replica._deployment_config.autoscaling_config
            assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
        # A replica that is no longer wanted outlives every request.
        assert replica._deployment_config.graceful_shutdown_timeout_s > 600


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"replicas": {"min_replicas": 0}}, "replicas.min_replicas must be at least 1"),
        ({"replicas": {"min_replicas": 3}}, "replicas.max_replicas must be at least 3"),
        ({"replicas": {"queue_lead": -1}}, "replicas.queue_lead must be at least 0"),
        (
            {"replicas": {"max_replicas": 2}, "cluster": {"num_gpus_per_draft": 0.5}},
            "cluster.num_gpus_per_draft must be a whole number, because replicas.max_replicas is more than 1",
        ),
    ],
)
def test_replicas_that_cannot_be_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"target": {"model": "m"}, **section})


def test_the_command_serves_one_deployment() -> None:
    result = CliRunner().invoke(cli, ["serve", "tiny-random", "replicas.max_replicas=2"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: replicas.max_replicas must be 1 with `outrider serve`, got 2")
