"""Our server as Ray Serve has it, without Serve: what it builds, and what it says of its health."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from outrider.cluster.api import EngineError
from outrider.cluster.engine import Engine
from outrider.cluster.serving.ray_serve import Server, application
from outrider.configs.loader import config_to_yaml
from support.fake_workers import FAKE_CONFIG
from support.posted_engine import PostedEngine, posted_engine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[PostedEngine]:
    with posted_engine(str.upper) as engine:
        monkeypatch.setattr(Engine, "start", lambda config: engine)
        yield engine


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "outrider.yaml"
    path.write_text(config_to_yaml(FAKE_CONFIG))
    return str(path)


def test_a_replica_answers_as_the_server_does(engine: PostedEngine, config: str) -> None:
    client = TestClient(Server(config).__serve_build_asgi_app__())
    assert client.get("/health").text == client.get("/ready").text == "ok"
    assert client.get("/v1/models").json()["data"][0]["id"] == FAKE_CONFIG.target.model


def test_a_replica_whose_deployment_broke_says_so(
    engine: PostedEngine, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(config)
    server.check_health()
    monkeypatch.setattr(PostedEngine, "failure", "target 1 died")
    with pytest.raises(EngineError, match="target 1 died"):
        server.check_health()


def test_the_application_wants_a_configuration_and_nothing_else(config: str) -> None:
    assert application({"config": config}) is not None
    with pytest.raises(ValueError, match=r"argument config alone, got \['config', 'port'\]"):
        application({"config": config, "port": "1"})
    with pytest.raises(ValueError, match="config must be a YAML file or one of"):
        application({"config": "nowhere"})
