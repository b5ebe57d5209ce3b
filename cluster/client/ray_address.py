"""Servers of a Ray cluster: a client that knows the cluster's address finds the server's."""

from outrider.configs.schema import ClusterConfig

COORDINATOR_PREFIX = "outrider-coordinator-"
"""How actors that know of a server are named."""

_ANSWER_S = 10.0


def is_url(address: str) -> bool:
    """Whether an address is a server's own, not a cluster's."""
    return address.startswith(("http://", "https://"))


def server_at(ray_address: str) -> str:
    """The URL of the server that runs in the cluster at this address (`auto`, host:port, or ray://host:port).

    Raises ValueError unless there is exactly one, or where the cluster cannot be joined.
    """
    # Whoever has a URL does without Ray.
    import ray
    from ray.exceptions import RayError
    from ray.util import list_named_actors

    from outrider.cluster.session import RaySession

    urls: list[str] = []
    with RaySession(ClusterConfig(ray_address=ray_address), num_cpus=1):
        for named in list_named_actors(all_namespaces=True):
            if not named["name"].startswith(COORDINATOR_PREFIX):
                continue
            try:
                coordinator = ray.get_actor(named["name"], named["namespace"])
                url: str = ray.get(coordinator.server_url.remote(), timeout=_ANSWER_S)  # type: ignore[assignment]
                urls.append(url)
            except (RayError, ValueError):
                continue  # it is ending
    urls = sorted(url for url in urls if url)
    if len(urls) != 1:
        found = ", ".join(urls) or "none"
        raise ValueError(f"the Ray at {ray_address} must have one server of `outrider serve`, it has {found}")
    return urls[0]
