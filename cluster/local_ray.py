"""A Ray of this machine, started for one run, with what a deployment needs of one and no more.

`ray.init` starts three daemons beside those that run actors: the head of the dashboard (also where the dashboard is
off, for the sake of usage statistics, and it waits for that), the autoscaler's monitor, and one that reads all logs
for drivers that want to see them. Each is a Python that imports Ray: 2.2 of the 6.6 s of a processor that a start of
Ray takes, with four actors (ray 2.60, 2 cores).
"""

import atexit
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private.node import Node
from ray._private.parameter import RayParams

from outrider.cluster.ray_watch import Daemon, daemons_of

# The control plane carries no tensors; Ray's default would map 30 % of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_SETTINGS = {
    # Ray gives workers way to everything else (nice 15); here the workers are what the machine is for.
    "worker_niceness": 0,
    # Ray starts a process for each CPU before anybody asks, and ends those that wait for a second: on a busy machine
    # before the deployment, which takes all of them, has got to them.
    "idle_worker_killing_time_threshold_ms": 60_000,
    # Its head remembers every call for the dashboard, which there is none of: under load, 13 MB a minute.
    "task_events_report_interval_ms": 0,
}


class _LeanNode(Node):
    """The head of a cluster without the dashboard's."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        self._webui_url = ""  # what Ray says where its dashboard is off


class LocalRay:
    """Started, and joined by this process, on creation; `stop` ends both."""

    def __init__(self, num_cpus: int) -> None:
        """Raises what Ray raises where it cannot start: OSError, RuntimeError, its own, and Exception itself."""
        parameters_of: Any = RayParams  # its types are narrower than what it takes
        parameters = parameters_of(
            num_cpus=num_cpus,
            resources={},
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
            _system_config=_SETTINGS,
        )
        self._node: Any = _LeanNode(
            parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True
        )
        self._process = os.getpid()
        atexit.register(self.stop)
        try:
            ray.init(self._node.address, log_to_driver=False, logging_level=logging.ERROR)
        except BaseException:
            self.stop()
            raise

    @property
    def folder(self) -> Path:
        """Of the session: logs, sockets."""
        return Path(self._node.get_session_dir_path())

    @property
    def daemons(self) -> Mapping[str, Daemon]:
        """Processes that were started, by Ray's names for them."""
        return daemons_of(self._node)

    def stop(self) -> None:
        """Ends it in order. May be called again; a process that was forked from the one that started it cannot."""
        if os.getpid() != self._process:
            return
        atexit.unregister(self.stop)
        if ray.is_initialized():
            ray.shutdown()
        self._node.kill_all_processes(check_alive=False, allow_graceful=True)
