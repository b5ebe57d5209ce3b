"""What is said of a Ray that has ended."""

import socket
import subprocess
import sys

import pytest

from outrider.cluster import ray_watch
from outrider.cluster.ray_watch import RayWatch


def test_a_daemon_that_was_started_here_and_has_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    clock = [0.0]
    monkeypatch.setattr(ray_watch.time, "monotonic", lambda: clock[-1])
    watch = RayWatch({"raylet": daemon}, "", "")
    clock.append(1000.0)
    assert watch.complaint() == ""
    daemon.kill()
    daemon.wait()
    assert watch.complaint().startswith("Ray's raylet, which was started for this, has ended")


def test_a_head_elsewhere_may_be_silent_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(ray_watch.time, "monotonic", lambda: clock[-1])

    def complaint(at_s: float) -> str:
        clock.append(at_s)
        return watch.complaint()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        head = f"127.0.0.1:{listener.getsockname()[1]}"
        watch = RayWatch({}, head, "")
        assert [complaint(at_s) for at_s in (10.0, 100.0)] == ["", ""]
    assert [complaint(at_s) for at_s in (103.0, 120.0, 139.0)] == ["", "", ""]
    assert complaint(143.0) == f"Ray's head at {head} did not answer for 40 s: it is gone"


def test_a_node_that_ray_takes_for_dead_is_known_after_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": "ours", "Alive": True}, {"NodeID": "another", "Alive": False}]
    monkeypatch.setattr(ray_watch.ray, "nodes", lambda: nodes)
    watch = RayWatch({}, "", "ours")
    assert watch.complaint_after_loss() == ""
    nodes[0]["Alive"] = False
    assert watch.complaint_after_loss().startswith("Ray takes this machine for dead")
    assert watch.complaint() == ""
