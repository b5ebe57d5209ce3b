"""The driver's connection to Ray: one started for this run, or one that is there."""

import logging
import os
import threading
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray._raylet import Config as RayCoreConfig  # type: ignore[attr-defined]  # a compiled module

from outrider.cluster.guard import Guard
from outrider.cluster.interrupts import interrupts_deferred
from outrider.cluster.ray_errors import check_joinable, start_failure
from outrider.cluster.ray_process import Keeper, keep_token_private, started_processes, stop_reports
from outrider.cluster.session_folder import SessionFolder, remove_abandoned
from outrider.configs.schema import ClusterConfig

# The control plane carries no tensors; Ray's default would map 30 % of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20


def _connect(cluster: ClusterConfig, num_cpus: int) -> SessionFolder | None:
    """The folder of the Ray that was started, if one was."""
    address = cluster.ray_address
    if address != "local":
        if not address.startswith("ray://"):
            check_joinable(address, cluster.ray_auth)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        stop_reports()
        return None
    context: Any = ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Ray gives workers way to everything else (nice 15); here the workers are what the machine is for. And its
        # head remembers every call for the dashboard, which there is none of: under load, 13 MB a minute.
        _system_config={"worker_niceness": 0, "task_events_report_interval_ms": 0},
    )
    path = Path(context.address_info["session_dir"])
    folder = SessionFolder(path)
    remove_abandoned(path.parent)
    stop_reports()
    return folder


class RaySession:
    """Connects on creation, disconnects on close; a Ray that was started here ends with it.

    A driver that is connected to Ray already keeps its connection, whatever the config says.
    """

    def __init__(self, cluster: ClusterConfig, num_cpus: int) -> None:
        self._owned = not ray.is_initialized()
        self._keeper: Keeper[SessionFolder | None] | None = None
        self._folder: SessionFolder | None = None
        self._guard: Guard | None = None
        if not self._owned:
            return
        # Ray takes this from the environment alone and has read it when it was imported.
        os.environ["RAY_AUTH_MODE"] = cluster.ray_auth
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if cluster.ray_address == "local" and cluster.ray_auth == "token":
            keep_token_private(Path.home())
        RayCoreConfig.initialize("")
        try:
            with interrupts_deferred():
                connect = partial(_connect, cluster, num_cpus)
                if threading.current_thread() is threading.main_thread():
                    self._folder = (
                        connect()
                    )  # the signal handlers that Ray wants are set by this thread alone
                else:
                    self._keeper = Keeper(connect)
                    self._folder = self._keeper.made
            if cluster.ray_address == "local" and hasattr(os, "pidfd_open"):
                self._guard = Guard(started_processes())
        except (KeyboardInterrupt, ValueError):
            self.close()
            raise
        except Exception as error:  # Ray raises OSError, RuntimeError, its own, and Exception itself
            self.close()
            raise start_failure(error, cluster.ray_address) from error

    def close(self, failed: bool = False) -> None:
        """failed: Ray's logs may say why, so they are kept for a day."""
        if self._owned and ray.is_initialized():
            ray.shutdown()
        if self._guard is not None:
            if failed:  # Ray may be what failed: its agents look for its head for a minute
                self._guard.finish()
            else:
                self._guard.release()
        if self._keeper is not None:
            self._keeper.release()
        if self._folder is not None:
            self._folder.close(keep=failed)
            self._folder = None

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
