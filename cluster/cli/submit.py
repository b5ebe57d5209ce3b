"""`outrider submit`: a command as a job of a running Ray cluster, with this package and a configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from outrider.cluster.cli.after_dashes import WithCommand, after_dashes
from outrider.cluster.cli.job import JobAddress, end_as, follow
from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.configs.loader import load_config

submit = typer.Typer(add_completion=False, rich_markup_mode=None)


@submit.command(
    "submit", cls=WithCommand, options_metavar="[OPTIONS]", epilog="-- COMMAND ... ends the line."
)
def submit_command(
    ctx: typer.Context,
    config: ConfigName,
    overrides: Overrides = [],
    address: JobAddress = None,
    working_dir: Annotated[
        str, typer.Option(metavar="DIR", help="Files that the job runs among.", show_default=False)
    ] = "",
    wheel: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Of the package, in place of the one that runs here.", show_default=False
        ),
    ] = "",
    job_id: Annotated[str, typer.Option("--id", help="A name for the job.", show_default=False)] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id, and leave.")] = False,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job; else it goes on.")
    ] = False,
) -> None:
    """Run COMMAND in a Ray cluster and follow it: outrider submit CONFIG [a.b=c ...] -- COMMAND ...

    The configuration is outrider.yaml where the command runs; `outrider` is the package that was sent along.
    The exit code is the command's.
    """
    command = after_dashes(ctx)
    if not command:
        raise ValueError(
            "-- COMMAND must stand at the end, as in: -- outrider batch outrider.yaml --input ..."
        )
    loaded = load_config(config, overrides)
    if loaded.cluster.ray_address == "local":
        loaded = replace(loaded, cluster=replace(loaded.cluster, ray_address="auto"))

    from outrider.cluster.jobs.client import Jobs

    jobs = Jobs(address, loaded.cluster.ray_auth)
    sent = jobs.submit(
        loaded,
        command,
        Path(working_dir) if working_dir else None,
        Path(wheel) if wheel else None,
        job_id,
    )
    if no_wait:
        typer.echo(sent)
        return
    typer.echo(f"job {sent}", err=True)
    end_as(follow(jobs, sent, stop_on_interrupt))
