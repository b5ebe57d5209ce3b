"""Our server in Ray Serve: `serve run outrider.cluster.serving.ray_serve:application config=FILE`."""

from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from outrider.cluster.placement import CPUS_IN_SERVE
from outrider.cluster.serving.replicas.front import Front
from outrider.cluster.serving.replicas.number import DEPLOYMENT, number_of_replicas
from outrider.cluster.serving.replicas.replica import Replica
from outrider.cluster.serving.replicas.router import PrefixRouter
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from ray.serve import Application

_HEALTH_PERIOD_S = 5.0
_SPARE_PLACES = 64  # beyond server.max_concurrent: probes, and requests that are told to come again
_END_S = 30.0  # for the end of a deployment whose requests have ended
_DRAIN_PERIOD_S = 1.0


def application(arguments: dict[str, str]) -> "Application":
    """What Serve runs: a front, and as many replicas as section `replicas` says.

    arguments: `config` is the configuration's file or preset. Raises ValueError.
    """
    if set(arguments) != {"config"}:
        raise ValueError(f"the application must have the argument config alone, got {sorted(arguments)}")
    config = load_config(arguments["config"])
    places = config.server.max_concurrent + _SPARE_PLACES
    # All requests have ended by then: none takes longer.
    drained_s = config.server.max_request_s + _END_S
    router_class: Any = PrefixRouter
    router = RequestRouterConfig(
        request_router_class=router_class,
        request_router_kwargs={
            "queue_lead": config.replicas.queue_lead,
            "prefix_blocks": config.replicas.prefix_blocks,
        },
    )
    replica = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=places,
        ray_actor_options={"num_cpus": CPUS_IN_SERVE},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=_DRAIN_PERIOD_S,
        graceful_shutdown_timeout_s=drained_s,
        request_router_config=router,
        **number_of_replicas(config),
    )
    # One front: it knows what all replicas were sent.
    front = serve.deployment(
        name="Front",
        num_replicas=1,
        max_ongoing_requests=places * config.replicas.max_replicas,
        ray_actor_options={"num_cpus": CPUS_IN_SERVE},
        graceful_shutdown_wait_loop_s=_DRAIN_PERIOD_S,
        graceful_shutdown_timeout_s=drained_s,
    )
    replicas = replica(Replica).bind(arguments["config"])
    return front(serve.ingress()(Front)).bind(arguments["config"], replicas)
