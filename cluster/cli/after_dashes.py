"""Commands of ours that are followed by a command of the user's: `outrider submit CONFIG -- python job.py`."""

import typer
from typer.core import TyperCommand

_KEY = "outrider.after_dashes"


class WithCommand(TyperCommand):
    """Keeps what stands behind the first `--`, which click would add to our own arguments."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if "--" in args:
            place = args.index("--")
            args, ctx.meta[_KEY] = args[:place], args[place + 1 :]
        return super().parse_args(ctx, args)


def after_dashes(ctx: typer.Context) -> list[str]:
    """The user's command; empty if there is none."""
    command: list[str] = ctx.meta.get(_KEY, [])
    return command
