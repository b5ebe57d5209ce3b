"""Runs the HTTP application until the process is told to end."""

import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from ray.util import get_node_ip_address

from outrider.cluster.serving.gate import App
from outrider.configs.schema import ServerConfig

_BACKLOG = 1024  # connections that wait to be accepted


def bind(config: ServerConfig) -> socket.socket:
    """A socket at the server's address, which nobody hears yet: an address in use is known before models load.

    Raises ValueError for an address that cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"server.host and server.port must be a free address of this machine, got {config.host} and "
            f"{config.port}: {error.strerror or error}"
        ) from error
    return listener


def listen(listener: socket.socket) -> None:
    """From now on connections wait until `run` takes them: whoever is told of the server may come at once."""
    listener.listen(_BACKLOG)


def address_of(listener: socket.socket) -> str:
    """The server's URL: with the machine's own address where it listens on all of them."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = get_node_ip_address()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether nobody outside this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def run(app: App, listener: socket.socket, config: ServerConfig) -> None:
    """Serves until SIGINT or SIGTERM: answers under way get `server.shutdown_s` to end in."""
    settings = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=max(1, round(config.shutdown_s)),
    )
    uvicorn.Server(settings).run(sockets=[listener])


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """Inside the block SIGTERM leaves it as Ctrl-C does, so that what it started is ended."""

    def leave(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal_number)

    usual = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def log_to_stderr() -> None:
    """A line of JSON for each request; warnings of everybody else as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("outrider.server")
    requests.setLevel(logging.INFO)
    requests.handlers = [handler]
    requests.propagate = False
