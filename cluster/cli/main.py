"""The command `outrider`. Each command is a module of this folder, imported when it is asked for."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from outrider.cluster.api import EngineError

COMMANDS = ("generate", "chat", "bench", "check", "config", "demo", "doctor")
"""Module and function names: `outrider generate` is `generate` in generate.py."""

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
        command = typer.Typer(add_completion=False, rich_markup_mode=None)
        command.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(command)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            typer.echo("Interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except EngineError as error:
            typer.echo(f"Error: {error}", err=True)
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


@app.callback()
def _root() -> None:
    pass


def run() -> None:
    """Entry point of the console script."""
    sys.exit(app())
