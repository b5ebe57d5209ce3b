"""How many replicas there are, as Ray Serve is told: in its own options, and in an application's configuration."""

from typing import Any

from outrider.configs.schema import Config

DEPLOYMENT = "Replica"
"""Serve's name for them."""


def number_of_replicas(config: Config) -> dict[str, Any]:
    """The option that says it: a number, or bounds between which Serve goes by requests under way."""
    replicas = config.replicas
    if replicas.min_replicas == replicas.max_replicas:
        return {"num_replicas": replicas.min_replicas}
    bounds = {
        "min_replicas": replicas.min_replicas,
        "max_replicas": replicas.max_replicas,
        "target_ongoing_requests": replicas.requests_per_replica,
    }
    return {"autoscaling_config": bounds}
