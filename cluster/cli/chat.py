"""`outrider chat`: a conversation in the terminal."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from outrider.cluster.cli.options import (
    ConfigName,
    MaxTokens,
    Overrides,
    Plain,
    Seed,
    Temperature,
    TopP,
    draft_options,
    given,
)
from outrider.cluster.cli.show import LEGEND, show_stream, summary
from outrider.cluster.cli.start import running_engine
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.cluster.engine import Engine

_HELP = "Ctrl-C ends an answer, /new starts over, /exit or Ctrl-D leaves."


def chat(
    config: ConfigName,
    overrides: Overrides = [],
    system: Annotated[str, typer.Option(help="System message.", show_default=False)] = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    plain: Plain = False,
) -> None:
    """Talk to the target."""
    loaded = load_config(config, overrides)
    sampling = given({"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens})
    with running_engine(loaded) as engine:
        _converse(engine, system, sampling, draft_options(plain, [], None, None))


def _converse(engine: "Engine", system: str, sampling: dict[str, object], draft: dict[str, object]) -> None:
    console, notes = Console(), Console(stderr=True)
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    if console.is_terminal:
        notes.print(_HELP, style="dim")
        console.print(LEGEND)
    while True:
        try:
            line = input("> " if console.is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = list(first)
            continue
        if not line:
            continue
        question = {"role": "user", "content": line}
        try:
            answer = show_stream(console, engine.stream([*messages, question], sampling, draft))
        except ValueError as error:
            # The conversation as it was before the question is still good.
            typer.echo(f"Error: {error}; /new starts over", err=True)
            continue
        except KeyboardInterrupt:
            typer.echo("\n(interrupted)", err=True)
            continue
        if answer.error:
            typer.echo(f"Error: {answer.error}", err=True)
            continue
        messages += [question, {"role": "assistant", "content": answer.text}]
        if notes.is_terminal:
            notes.print(summary(answer), style="dim", highlight=False)
