"""Why Ray cannot be started or joined, in one line; Ray says it in tracebacks, in its log, or not at all."""

import os
import socket

from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
from ray.exceptions import AuthenticationError, RayError, RpcError

from outrider.cluster.api import EngineError

_PROBE_TIMEOUT_S = 5.0


def check_joinable(address: str, auth: str) -> None:
    """Asks the Ray at `address` (`auto` or host:port) for anything, to learn whether it would let us in.

    Ray itself, kept out, tries for 20 s to two minutes, logs every try, and ends without the cause.
    Raises ValueError naming the configuration key.
    """
    try:
        found = canonicalize_bootstrap_address(address)
    except ValueError as error:
        raise not_joinable(address, str(error)) from error
    if found is None:
        return  # nobody runs here that Ray knows of: it says so itself
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise not_joinable(address, f"nothing answers at {found} ({error})") from error
    try:
        # Without a token the client below would end the process.
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        # With an id of its own choice a client does not ask for the cluster's, which it would do 20 times.
        client = GcsClient(address=found, cluster_id=os.urandom(28).hex())
        client.internal_kv_get(b"outrider", None, timeout=_PROBE_TIMEOUT_S)
    except AuthenticationError as error:
        if "WrongClusterID" in error.message:
            return  # only the id was wrong: the token is right, or none is wanted
        missing = "no authentication token was found" in error.message
        ours = "the one here is another" if auth == "token" else "cluster.ray_auth = disabled sends none"
        raise ValueError(
            f"cluster.ray_auth must suit the Ray at {found}: it wants a token, and "
            f"{'there is none here' if missing else ours}; a run with cluster.ray_auth = token "
            "reads ~/.ray/auth_token, or the file that RAY_AUTH_TOKEN_PATH names"
        ) from error
    except RpcError as error:  # not even in a quarter of a minute; Ray itself would try for many
        raise not_joinable(
            address, f"what answers at {found} does not answer as Ray does ({error})"
        ) from error
    except RayError:
        return  # joining will say more


def not_joinable(address: str, reason: str) -> ValueError:
    """The error for a Ray that cannot be joined."""
    return ValueError(f"cluster.ray_address must be local or a Ray that runs, got {address!r}: {reason}")


def start_failure(error: Exception, address: str) -> ValueError | EngineError:
    """What a user should read when `ray.init(address)` has raised `error`."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if address != "local":
        return not_joinable(address, reason)
    if "AF_UNIX path length" in reason:
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR", "")
        return ValueError(
            f"TMPDIR must be a shorter path for the names of Ray's sockets, got {folder!r}; "
            "RAY_TMPDIR=/tmp sets it for Ray alone"
        )
    return EngineError(f"Ray could not start on this machine: {reason}")
