"""What is said of a Ray that has ended."""

import socket
import subprocess
import sys

import pytest

from outrider.cluster import ray_watch
from outrider.cluster.ray_watch import RayWatch


def test_a_daemon_that_was_started_here_and_has_ended_is_named() -> None:
    daemon = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watch = RayWatch({"raylet": daemon}, "")
    assert watch.complaint() == ""
    daemon.kill()
    daemon.wait()
    assert watch.complaint().startswith("Ray's raylet, which was started for this, has ended")


def test_a_head_elsewhere_may_be_silent_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(ray_watch.time, "monotonic", lambda: now_s)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        head = f"127.0.0.1:{listener.getsockname()[1]}"
        watch = RayWatch({}, head)
        for now_s in (10.0, 100.0):
            assert watch.complaint() == ""
    for now_s in (103.0, 120.0, 139.0):
        assert watch.complaint() == ""
    now_s = 143.0
    assert watch.complaint() == f"Ray's head at {head} did not answer for 40 s: it is gone"
