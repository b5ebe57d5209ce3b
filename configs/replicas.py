"""Section `replicas` of a configuration: several deployments behind one address, in Ray Serve."""

from dataclasses import dataclass

from outrider.configs.checks import require_at_least


@dataclass(frozen=True)
class ReplicasConfig:
    """How many deployments Ray Serve runs, each with processes and GPUs of its own, and which of them a request
    goes to. `outrider serve` runs one."""

    min_replicas: int = 1
    """Fewest deployments."""

    max_replicas: int = 1
    """Most deployments; more than `min_replicas`: Ray Serve starts and ends some as requests come."""

    requests_per_replica: int = 16
    """Requests under way that a deployment is there for: with more of them Ray Serve starts another, with fewer it
    ends one, between `min_replicas` and `max_replicas`."""

    queue_lead: int = 8
    """How many more requests than the idlest deployment another may have under way and still get those whose
    prompts begin as some that it has had; 0: only where as few are under way."""

    prefix_blocks: int = 65536
    """Most beginnings of prompts that are remembered of each deployment, counted in blocks of 64 characters; those
    that were asked for longest ago are forgotten."""

    def __post_init__(self) -> None:
        require_at_least(self, "replicas", 1, "min_replicas", "requests_per_replica", "prefix_blocks")
        require_at_least(self, "replicas", self.min_replicas, "max_replicas")
        require_at_least(self, "replicas", 0, "queue_lead")
