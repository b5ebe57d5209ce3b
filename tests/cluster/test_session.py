"""What a user reads when Ray cannot be started or joined."""

import re
import socket

import pytest
from ray.exceptions import RpcError

from outrider.cluster import local_ray, ray_errors
from outrider.cluster.api import EngineError
from outrider.cluster.session import RaySession
from outrider.configs.schema import ClusterConfig

TOO_LONG = "validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /very/long"
TIMED_OUT = (
    "The current node timed out during startup. This could happen because some processes failed.\nMore."
)


def fail_to_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def start(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(local_ray, "_LeanNode", start)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(TOO_LONG), ValueError, "TMPDIR must be a shorter path .*, got '/very'; RAY_TMPDIR=/tmp"),
        (
            Exception(TIMED_OUT),
            EngineError,
            "Ray could not start on this machine: The current node timed out",
        ),
        (
            PermissionError(13, "Permission denied", "/home/x/.ray"),
            EngineError,
            "Ray could not .*/home/x/.ray",
        ),
        (RuntimeError(), EngineError, "Ray could not start on this machine: RuntimeError"),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/very")
    fail_to_start(monkeypatch, error)
    with pytest.raises(kind, match=message) as caught:
        RaySession(ClusterConfig(), num_cpus=2)
    assert "\n" not in str(caught.value)


def test_a_ray_that_is_not_there_is_named_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port, nobody answers
        port = listener.getsockname()[1]
        message = rf"cluster\.ray_address must be .*, got '127\.0\.0\.1:{port}': nothing answers at .*refused"
        with pytest.raises(ValueError, match=message):
            RaySession(ClusterConfig(ray_address=f"127.0.0.1:{port}"), num_cpus=2)


def test_what_answers_and_is_no_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def silence(**arguments: object) -> None:
        raise RpcError("Timed out while waiting for GCS to become available.")

    # A web server, say: Ray's own client finds out in 15 seconds, `ray.init` in many minutes.
    monkeypatch.setattr(ray_errors, "GcsClient", silence)
    with socket.create_server(("", 0)) as listener:  # Ray asks at this machine's own address
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        message = (
            rf"cluster\.ray_address must be .*, got '{address}': what answers at .* does not answer as Ray"
        )
        with pytest.raises(ValueError, match=message):
            RaySession(ClusterConfig(ray_address=address), num_cpus=2)


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("cluster.ray_address must be local or a Ray that runs")):
        RaySession(ClusterConfig(ray_address="foo"), num_cpus=2)
