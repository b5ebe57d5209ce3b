"""The driver's connection to Ray: one started for this run, or one that is there."""

import logging
import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

import ray
from ray._raylet import Config as RayCoreConfig  # type: ignore[attr-defined]  # a compiled module

from outrider.cluster.guard import Guard
from outrider.cluster.interrupts import interrupts_deferred
from outrider.cluster.local_ray import LocalRay
from outrider.cluster.ray_errors import check_joinable, start_failure
from outrider.cluster.ray_process import Keeper, keep_token_private, stop_reports, with_children
from outrider.cluster.ray_watch import Daemon, started_daemons
from outrider.cluster.session_folder import SessionFolder, remove_abandoned
from outrider.configs.schema import ClusterConfig


def _join(cluster: ClusterConfig) -> None:
    """A Ray that is there."""
    address = cluster.ray_address
    if not address.startswith("ray://"):
        check_joinable(address, cluster.ray_auth)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    stop_reports()


def _start(num_cpus: int) -> LocalRay:
    local = LocalRay(num_cpus)
    stop_reports()
    return local


class RaySession:
    """Connects on creation, disconnects on close; a Ray that was started here ends with it.

    A driver that is connected to Ray already keeps its connection, whatever the config says.
    """

    def __init__(self, cluster: ClusterConfig, num_cpus: int) -> None:
        self._owned = not ray.is_initialized()
        self._local: LocalRay | None = None
        self._keeper: Keeper[LocalRay] | None = None
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
                if cluster.ray_address != "local":
                    _join(cluster)
                elif threading.current_thread() is threading.main_thread():
                    # The signal handlers that Ray wants are set by this thread alone.
                    self._local = _start(num_cpus)
                else:
                    self._keeper = Keeper(partial(_start, num_cpus))
                    self._local = self._keeper.made
            if self._local is not None:
                self._folder = SessionFolder(self._local.folder)
                remove_abandoned(self._local.folder.parent)
                if hasattr(os, "pidfd_open"):
                    self._guard = Guard(with_children(self.daemons))
        except (KeyboardInterrupt, ValueError):
            self.close()
            raise
        except Exception as error:  # Ray raises OSError, RuntimeError, its own, and Exception itself
            self.close()
            raise start_failure(error, cluster.ray_address) from error

    @property
    def daemons(self) -> Mapping[str, Daemon]:
        """Those of a Ray that this process has started, here or with a `ray.init` of its own, by Ray's names."""
        return started_daemons() if self._local is None else self._local.daemons

    def close(self, failed: bool = False) -> None:
        """failed: Ray's logs may say why, so they are kept for a day."""
        if self._local is not None:
            self._local.stop()
        elif self._owned and ray.is_initialized():
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
