"""Where a server is: a client that knows the address of its Ray cluster finds it, too."""

import re

import httpx

from outrider.configs.schema import ClusterConfig

COORDINATOR_PREFIX = "outrider-coordinator-"
"""How actors that know of a server are named."""

_ANSWER_S = 10.0
_HOST_PORT = re.compile(r"[\w.-]+:\d+")


def server_url(address: str) -> str:
    """Where the server is: at its own URL (`/v1`, with which other clients want it, may be there), at host:port, or
    in a Ray cluster. Raises ValueError where there is none."""
    if address.startswith(("http://", "https://")):
        return address.rstrip("/").removesuffix("/v1")
    if _HOST_PORT.fullmatch(address) and _speaks_http(address):
        return f"http://{address}"
    return server_at(address)


def _speaks_http(host_port: str) -> bool:
    """Ray's own ports do not, but for its dashboard."""
    try:
        return httpx.get(f"http://{host_port}/v1/models", timeout=_ANSWER_S).status_code != 404
    except httpx.TransportError:
        return False


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
    try:
        session = RaySession(ClusterConfig(ray_address=ray_address), num_cpus=1)
    except ValueError as error:
        raise ValueError(f"url must be a server's, or the address of a Ray that has one: {error}") from error
    with session:
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
