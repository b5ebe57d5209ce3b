"""Our server in Ray Serve: `serve run outrider.cluster.serving.ray_serve:application config=FILE`."""

import logging
from typing import TYPE_CHECKING

from ray import serve

from outrider.cluster.api import EngineError
from outrider.cluster.engine import Engine
from outrider.cluster.serving.app import create_app
from outrider.cluster.serving.gate import App
from outrider.cluster.serving.limits import ApiKeys
from outrider.cluster.serving.server import log_to_stderr
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from ray.serve import Application

_NUM_CPUS = 0.1  # bookkeeping: Serve would reserve a whole one
_HEALTH_PERIOD_S = 5.0
_SPARE_PLACES = 64  # beyond server.max_concurrent: probes, and requests that are told to come again


class Server:
    """A replica: a deployment of its own, and the HTTP application in front of it. Serve's proxy speaks to clients.

    Serve waits for as long as models load; a replica whose deployment broke is replaced.
    """

    def __init__(self, config: str) -> None:
        """config: a file or a preset, as for `outrider serve`; `server.host` and `server.port` are Serve's."""
        self._config = load_config(config)
        ApiKeys(self._config.server.api_keys_file)  # a bad file is known before models are loaded
        log_to_stderr()
        self._engine = Engine.start(self._config)

    def __serve_build_asgi_app__(self) -> App:
        return create_app(self._engine, self._config)

    def check_health(self) -> None:
        """Serve asks every few seconds. Raises EngineError."""
        if self._engine.failure:
            logging.getLogger("outrider").error(self._engine.failure)
            raise EngineError(self._engine.failure)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def application(arguments: dict[str, str]) -> "Application":
    """What Serve runs; argument `config` is the configuration's file or preset. Raises ValueError."""
    if set(arguments) != {"config"}:
        raise ValueError(f"the application must have the argument config alone, got {sorted(arguments)}")
    config = load_config(arguments["config"])
    deployment = serve.deployment(
        name="Server",
        num_replicas=1,
        max_ongoing_requests=config.server.max_concurrent + _SPARE_PLACES,
        ray_actor_options={"num_cpus": _NUM_CPUS},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=config.server.shutdown_s,
    )
    return deployment(serve.ingress()(Server)).bind(arguments["config"])
