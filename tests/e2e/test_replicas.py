"""Two replicas behind one address: Ray Serve, with a deployment for each, spoken to by our client and plain HTTP."""

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from outrider import Client
from outrider.cluster.deploying.kuberay import manifests
from outrider.cluster.session import RaySession
from outrider.configs.loader import config_to_yaml, load_config
from outrider.configs.schema import ClusterConfig
from support.waiting import wait_until

# Ray, its Serve and two deployments are 16 processes, whose start alone takes two cores 30 s.
pytestmark = pytest.mark.slow

BEGINNINGS = [
    "a lighthouse at the end of the world is kept by " * 2,
    "of all the ships that sailed that year only " * 2,
]
LONG = {"max_tokens": 1000, "ignore_eos": True}
ENDLESS = {"max_tokens": 1800, "ignore_eos": True, "speculative": "off"}
LIMIT_S = 120.0
LEAD = 2


@dataclass
class Served:
    """An application that runs."""

    path: Path
    url: str

    def scale(self, num_replicas: int) -> None:
        """Gives Serve what a RayService gives it, which is what `serve deploy` does."""
        overrides = [
            "server.model_name=tiny",
            "cluster.start_timeout_s=240",
            "rounds.max_sequences=4",
            "target.max_context=2048",
            "target.kv_cache_bytes=16MiB",
            "draft.kv_cache_bytes=16MiB",
            f"replicas.min_replicas={num_replicas}",
            f"replicas.max_replicas={num_replicas}",
            f"replicas.queue_lead={LEAD}",
            "deploy.image=none",
        ]
        config = load_config("tiny-random", overrides)
        self.path.write_text(config_to_yaml(config))
        _, manifest = manifests(config, "RayService", ())
        told = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        del told["http_options"]
        told["applications"][0]["args"] = {"config": str(self.path)}
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema(**told), _blocking=True)

    def stopping(self) -> bool:
        """Whether a replica was told to end and has not yet."""
        states = serve.status().applications["outrider"].deployments["Replica"].replica_states
        return bool(states.get("STOPPING"))

    def gauge(self, name: str) -> dict[str, float]:
        """By replica."""
        text = httpx.get(f"{self.url}/metrics", timeout=LIMIT_S).text
        return {
            one: float(value) for one, value in re.findall(rf'^{name}{{.*replica="(.*)"}} (.*)$', text, re.M)
        }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with RaySession(ClusterConfig(), num_cpus=8):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            served = Served(tmp_path_factory.mktemp("replicas") / "outrider.yaml", f"http://127.0.0.1:{port}")
            served.scale(2)
            yield served
        finally:
            serve.shutdown()


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=LIMIT_S) as client:
        yield client


def test_prompts_that_begin_alike_go_to_one_replica_until_its_queue_is_long(
    served: Served, http: httpx.Client
) -> None:
    def replica_of(prompt: str) -> str:
        answer = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4})
        assert answer.status_code == 200
        assert len(answer.headers.get_list("x-request-id")) == 1
        return answer.headers["x-outrider-replica"]

    homes = [replica_of(beginning) for beginning in BEGINNINGS]
    assert len(set(homes)) == 2  # nothing in common: spread
    for number in range(4):
        assert [replica_of(f"{beginning}{number}") for beginning in BEGINNINGS] == homes
    reading = []  # an iterator that goes closes its connection
    with ExitStack() as stack:

        def begun(number: int) -> str:
            asked = {"prompt": f"{BEGINNINGS[0]}long {number}", "stream": True, **ENDLESS}
            answer = stack.enter_context(http.stream("POST", "/v1/completions", json=asked))
            assert answer.status_code == 200, answer.read()
            lines = answer.iter_lines()
            next(lines)
            reading.append(lines)
            return answer.headers["x-outrider-replica"]

        assert [begun(number) for number in range(LEAD + 2)] == [homes[0]] * (LEAD + 1) + [homes[1]]
        assert set(served.gauge("vllm:num_requests_running")) == set(homes)
    # All four have left.
    wait_until(lambda: served.gauge("vllm:num_requests_running") == dict.fromkeys(homes, 0.0), LIMIT_S)
    wait_until(lambda: served.gauge("vllm:kv_cache_usage_perc") == dict.fromkeys(homes, 0.0), LIMIT_S)


def test_a_replica_that_is_no_longer_wanted_loses_no_stream(served: Served) -> None:
    with Client(served.url, max_retries=0) as client, ThreadPoolExecutor(32) as pool:
        prompts = [f"{BEGINNINGS[number % 2]}{number}" for number in range(12)]
        answers = [pool.submit(list, client.stream(prompt, LONG)) for prompt in prompts]
        # Both have streams under way, and some that wait.
        wait_until(lambda: min(served.gauge("vllm:num_requests_waiting").values()) > 0, LIMIT_S)
        before = served.gauge("outrider_up").keys()

        def num_while_one_stops() -> int:
            """How many streams go on then."""
            wait_until(served.stopping, LIMIT_S)
            return sum(not answer.done() for answer in answers)

        unfinished = pool.submit(num_while_one_stops)
        served.scale(1)
        assert unfinished.result(LIMIT_S) > 0
        later = [pool.submit(client.generate, prompt, LONG) for prompt in prompts[:4]]
        texts = ["".join(part.text for part in answer.result(LIMIT_S)) for answer in answers]
        wait_until(lambda: len(served.gauge("outrider_up")) == 1, LIMIT_S)
        assert served.gauge("outrider_up").keys() < before  # the other was left alone
        plain = pool.map(
            lambda prompt: client.generate(prompt, {**LONG, "speculative": {"budget": 0}}).text, prompts
        )
        assert texts == list(plain)
        assert [one.result().text for one in later] == texts[:4]
