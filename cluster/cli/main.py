"""The command `outrider`. Each command is a module of this folder, imported when it is asked for."""

import errno
import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from outrider import __version__
from outrider.cluster.api import EngineError
from outrider.cluster.cli.terminal import AnsweredInterrupt, say_error

COMMANDS = (
    "generate",
    "chat",
    "serve",
    "batch",
    "bench",
    "table",
    "check",
    "distill",
    "trim",
    "slim",
    "train",
    "judge",
    "submit",
    "job",
    "deploy",
    "config",
    "plan",
    "demo",
    "doctor",
)
"""Module and function names: `outrider generate` is `generate` in generate.py; a Typer has commands of its own."""

USER_ERROR = 2
ENGINE_ERROR = 1
INTERRUPTED = 130


class LazyCommands(TyperGroup):
    """Imports a command's module on use, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"outrider.cluster.cli.{cmd_name}")
        entry = getattr(module, cmd_name)
        if isinstance(entry, typer.Typer):
            return typer.main.get_command(entry)
        command = typer.Typer(add_completion=False, rich_markup_mode=None)
        command.command(cmd_name)(entry)
        return typer.main.get_command(command)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            say_error(str(error))
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as interrupt:
            if not isinstance(interrupt, AnsweredInterrupt):
                typer.echo("Interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        except (EngineError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read the output has gone, as `head` does: no fault
            say_error(str(error))
            raise typer.Exit(ENGINE_ERROR) from error


app = typer.Typer(
    name="outrider",
    cls=LazyCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distributed speculative decoding: a drafter rides ahead, the target checks.",
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def run() -> None:
    """Entry point of the console script."""
    try:
        sys.exit(app())
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            # Said already; the interpreter would say it again, as it tries to write what is left.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
