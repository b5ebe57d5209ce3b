"""The section `cluster`: where the processes run, and what becomes of them when some are lost."""

from dataclasses import dataclass
from typing import Literal

from outrider.configs.checks import require, require_at_least


@dataclass(frozen=True)
class ClusterConfig:
    """Where the processes run. One placement group holds them all: a bundle per process, or for two on one GPU."""

    ray_address: str = "local"
    """`local` starts Ray in this machine for this run; `auto` joins the one that runs here; or host:port,
    or ray://host:port."""

    ray_auth: Literal["disabled", "token"] = "token"
    """Whether Ray's own calls carry a token; `token` reads ~/.ray/auth_token, which `local` makes."""

    num_cpus_per_target: float = 1.0
    """CPUs that Ray reserves for each target rank: bookkeeping, not a limit on threads."""

    num_gpus_per_target: float = 0.0
    """GPUs that Ray reserves for each target rank."""

    num_cpus_per_draft: float = 0.5
    """CPUs that Ray reserves for each rank of the drafter; the DraftWorker is the first."""

    num_gpus_per_draft: float = 0.0
    """GPUs that Ray reserves for each rank of the drafter. With `draft.placement: shared` it is the part of a target
    rank's `num_gpus_per_target` that is booked to the drafter, less than all of it: bookkeeping, which limits neither
    process's memory or time."""

    num_cpus_for_coordinator: float = 0.1
    """CPUs that Ray reserves for the Coordinator."""

    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy: together or apart, as a wish or (STRICT) as a condition."""

    start_timeout_s: float = 90.0
    """A start ends with an error when for so long, in seconds, there is no place for a process, a process does
    not answer, or nothing moves: no download, no loading, no measurement. One that moves may take longer."""

    group_timeout_s: float = 60.0
    """How long a rank waits for its peers before it takes them for dead, in seconds."""

    heartbeat_timeout_s: float = 10.0
    """A worker that does not say for so long that it lives, in seconds, is taken for lost. What it computes does not
    keep it from saying so; a machine that is far too busy may."""

    max_restarts: int = 10
    """Lost workers are started again, and requests go on where they were. After so many restarts in a row that were
    in vain (no token came, the deployment did not stand for `restart_window_s`) it ends. 0: any loss is its end."""

    restart_window_s: float = 60.0
    """How long a deployment has to stand without a loss for its restart not to have been in vain, in seconds."""

    spares: bool = False
    """Whether processes wait, started but without weights, to take the place of one that is lost: one for the
    Coordinator, and one for each rank of the target that has no GPU. A restart then takes less than a second instead
    of several; each needs about 300 MB of memory."""

    max_open_requests: int = 4096
    """Most requests that wait or run at a time; further ones are refused."""

    model_cache_dir: str = "~/.cache/outrider/models"
    """Folder for models taken out of packages (`pypi:`); `~` is the home of the worker's user."""

    def __post_init__(self) -> None:
        require(bool(self.ray_address), "cluster.ray_address", self.ray_address, "local, auto or an address")
        for name in ("num_cpus_per_target", "num_cpus_per_draft", "num_cpus_for_coordinator"):
            require(getattr(self, name) > 0, f"cluster.{name}", getattr(self, name), "more than 0")
        for name in ("num_gpus_per_target", "num_gpus_per_draft"):
            require(getattr(self, name) >= 0, f"cluster.{name}", getattr(self, name), "at least 0")
        require_at_least(self, "cluster", 1, "max_open_requests")
        require_at_least(self, "cluster", 0, "max_restarts")
        for name in ("start_timeout_s", "group_timeout_s", "heartbeat_timeout_s", "restart_window_s"):
            require(getattr(self, name) > 0, f"cluster.{name}", getattr(self, name), "more than 0")
