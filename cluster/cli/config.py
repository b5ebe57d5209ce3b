"""`outrider config`: what a config comes to, defaults and overrides included."""

import typer

from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.configs.loader import config_to_yaml, load_config


def config(config: ConfigName, overrides: Overrides = []) -> None:
    """Print the resolved configuration as YAML."""
    typer.echo(config_to_yaml(load_config(config, overrides)), nl=False)
