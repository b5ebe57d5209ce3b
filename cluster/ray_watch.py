"""Whether the Ray that this process uses is still there: of its end Ray itself says nothing.

Without its head Ray goes on for a minute and then ends the program (ray 2.60, `gcs_rpc_server_reconnect_timeout_s`);
without its raylet no process starts any longer, and whoever waits for one waits for ever.
"""

import contextlib
import socket
import time
from collections.abc import Mapping
from typing import Any, Protocol

import ray
from ray._private import worker as ray_worker
from ray.util.client import ray as ray_client

_VITAL = ("gcs_server", "raylet")
_PROBE_S = 2.0  # between two
_ANSWER_S = 1.0
_SILENT_S = 40.0  # a head that is started again is back by then; at 60 Ray ends the program


class Daemon(Protocol):
    """A process that this one started."""

    @property
    def pid(self) -> int:
        """Its id."""

    def poll(self) -> int | None:
        """How it has ended; None while it runs."""


class RayWatch:
    """Looks at the processes of a Ray that was started here, and at the head of another one.

    daemons: by name. head: host and port of the GCS; empty where nobody here has to do with it. node: id of the one
    that this process is on; empty likewise.
    """

    def __init__(self, daemons: Mapping[str, Daemon], head: str, node: str) -> None:
        self._daemons = daemons
        self._head = head
        self._node = node
        self._asked_s = self._heard_s = time.monotonic()

    def complaint(self) -> str:
        """Why nothing can come any longer; empty where all is well. Takes a second at most, mostly no time."""
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                return (
                    f"Ray's {name}, which was started for this, has ended; its logs in /tmp/ray may say why"
                )
        if not self._head:
            return ""
        now_s = time.monotonic()
        if now_s - self._asked_s > _PROBE_S:
            self._asked_s = now_s
            host, _, port = self._head.rpartition(":")
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
                self._heard_s = now_s
        if now_s - self._heard_s > _SILENT_S + _PROBE_S:
            return f"Ray's head at {self._head} did not answer for {_SILENT_S:g} s: it is gone"
        return ""

    def complaint_after_loss(self) -> str:
        """As `complaint`; asks the head, too, whether it takes this node for dead, which it never takes back."""
        if complaint := self.complaint():
            return complaint
        if any(node["NodeID"] == self._node and not node["Alive"] for node in ray.nodes()):
            return "Ray takes this machine for dead: its raylet was stopped, or kept from answering, for too long"
        return ""


def started_daemons() -> Mapping[str, Daemon]:
    """Of the Ray that `ray.init` has started in this process, by Ray's names; none where it has joined one."""
    node = ray_worker._global_node
    return {} if node is None else daemons_of(node)


def daemons_of(node: Any) -> Mapping[str, Daemon]:
    """Those that a node of Ray's has started."""
    return {name: infos[0].process for name, infos in node.all_processes.items()}


def watch_ray(started: Mapping[str, Daemon]) -> RayWatch:
    """Over the Ray that this process is connected to. started: the processes of it that this one has started."""
    if ray_client.is_connected():  # by a server of Ray's, which watches itself
        return RayWatch({}, "", "")
    daemons = {name: started[name] for name in _VITAL if name in started}
    context = ray.get_runtime_context()
    return RayWatch(daemons, "" if daemons else context.gcs_address, context.get_node_id())
