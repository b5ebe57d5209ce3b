"""What a deployment's containers are given, whoever starts them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from outrider.cluster.placement import CPUS_IN_SERVE, bundles
from outrider.configs.schema import Config

OBJECT_STORE_BYTES = 128 * 2**20
"""Of each node: the control plane carries no tensors."""

_ROUNDING = 1e-4  # Ray counts in ten-thousandths; a sum of floats must not fail by less


@dataclass(frozen=True)
class Capacity:
    """What a node, or some processes together, have of what Ray counts."""

    num_cpus: float
    num_gpus: float

    def holds(self, other: "Capacity") -> bool:
        """Whether the other fits in."""
        return self.num_cpus >= other.num_cpus - _ROUNDING and self.num_gpus >= other.num_gpus - _ROUNDING

    def without(self, other: "Capacity") -> "Capacity":
        """What is left beside the other."""
        return Capacity(self.num_cpus - other.num_cpus, self.num_gpus - other.num_gpus)


def check_layout(config: Config, num_in_serve: int = 0) -> None:
    """Refuses a deployment whose processes find no place on `deploy.num_nodes` nodes (ValueError).

    num_in_serve: processes of Ray Serve beside them.
    """
    deploy, strategy = config.deploy, config.cluster.placement
    node = Capacity(deploy.cpus_per_node, deploy.gpus_per_node)
    wanted = [Capacity(bundle["CPU"], bundle.get("GPU", 0.0)) for bundle in bundles(config)]
    if strategy == "STRICT_PACK":
        wanted = [_sum(wanted)]
    served = [Capacity(CPUS_IN_SERVE, 0.0)] * num_in_serve
    for one in wanted:
        what = "all processes of a STRICT_PACK" if strategy == "STRICT_PACK" else "each process"
        for key, has, needs in (
            ("cpus_per_node", node.num_cpus, one.num_cpus),
            ("gpus_per_node", node.num_gpus, one.num_gpus),
        ):
            if has < needs - _ROUNDING:
                raise ValueError(
                    f"deploy.{key} must be at least {math.ceil(needs)}, because a node holds {what}; got {has}"
                )
    needed = _num_nodes([*wanted, *served], node)
    if strategy == "STRICT_SPREAD":
        needed = max(needed, len(wanted))
    if needed > deploy.num_nodes:
        total = _sum([*wanted, *served])
        raise ValueError(
            f"deploy.num_nodes must be at least {needed}: {total.num_gpus:g} GPUs and {total.num_cpus:g} CPUs are "
            f"needed (cluster.placement = {strategy}), and a node has {node.num_gpus:g} and {node.num_cpus:g}; "
            f"got {deploy.num_nodes}"
        )


def in_containers(config: Config, api_keys_file: str) -> Config:
    """The configuration as the containers read it: Ray is there, and the server listens to everybody."""
    cache = config.deploy.cache_dir.rstrip("/")
    cluster = replace(config.cluster, ray_address="auto", model_cache_dir=f"{cache}/outrider")
    server = replace(config.server, host="0.0.0.0", api_keys_file=api_keys_file)
    return replace(config, cluster=cluster, server=server)


def hugging_face_home(config: Config) -> str:
    """Where Hugging Face's library keeps what it loads."""
    return f"{config.deploy.cache_dir.rstrip('/')}/huggingface"


def image(config: Config) -> str:
    """Raises ValueError where none is named."""
    if not config.deploy.image:
        raise ValueError("deploy.image must be a container image, as one of the Dockerfile; got ''")
    return config.deploy.image


def _sum(parts: Sequence[Capacity]) -> Capacity:
    return Capacity(sum(part.num_cpus for part in parts), sum(part.num_gpus for part in parts))


def _num_nodes(wanted: Sequence[Capacity], node: Capacity) -> int:
    """How many nodes hold all that is wanted, the largest first."""
    free: list[Capacity] = []
    for one in sorted(wanted, key=lambda one: (one.num_gpus, one.num_cpus), reverse=True):
        place = next((index for index, left in enumerate(free) if left.holds(one)), len(free))
        if place == len(free):
            free.append(node)
        free[place] = free[place].without(one)
    return len(free)
