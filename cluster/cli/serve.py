"""`outrider serve`: the deployment behind an HTTP server that speaks OpenAI's protocol."""

import typer

from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.cluster.cli.start import running_engine
from outrider.configs.loader import load_config


def serve(config: ConfigName, overrides: Overrides = []) -> None:
    """Serve the target to OpenAI's clients; server.host=... server.port=... say where."""
    loaded = load_config(config, overrides)
    if loaded.replicas.max_replicas > 1:
        raise ValueError(
            f"replicas.max_replicas must be 1 with `outrider serve`, got {loaded.replicas.max_replicas}: several run "
            "in Ray Serve, by `serve run outrider.cluster.serving.ray_serve:application config=FILE`"
        )

    from outrider.cluster.serving.app import create_app
    from outrider.cluster.serving.limits import ApiKeys
    from outrider.cluster.serving.server import (
        address_of,
        bind,
        is_local,
        listen,
        log_to_stderr,
        run,
        termination_as_exit,
    )

    ApiKeys(loaded.server.api_keys_file)  # a bad file is known before models are loaded
    with bind(loaded.server) as listener, running_engine(loaded) as engine, termination_as_exit():
        app = create_app(engine, loaded)
        log_to_stderr()
        if not loaded.server.api_keys_file and not is_local(listener):
            typer.echo(
                "Warning: whoever reaches this address is served; server.api_keys_file wants keys", err=True
            )
        listen(listener)
        engine.announce(address_of(listener))
        typer.echo(f"serving at {address_of(listener)}", err=True)
        run(app, listener, loaded.server)
