"""`outrider chat`: a conversation in the terminal."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from outrider.cluster.cli.options import (
    ConfigName,
    JudgeName,
    MaxTokens,
    Overrides,
    Plain,
    Rule,
    Seed,
    Temperature,
    TemplateArguments,
    Threshold,
    TopP,
    draft_options,
    given,
    template_arguments,
)
from outrider.cluster.cli.show import legend, show_stream, summary
from outrider.cluster.cli.start import running_engine
from outrider.cluster.cli.terminal import say_error
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.cluster.engine import Engine

_SOME_REFUSED = 1
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
    rule: Rule = None,
    judge: JudgeName = None,
    threshold: Threshold = None,
    template: TemplateArguments = [],
) -> None:
    """Talk to the target."""
    loaded = load_config(config, overrides)
    sampling = given({"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens})
    draft = draft_options(plain, [], None, None)
    acceptance = given({"rule": rule, "judge": judge, "threshold": threshold})
    arguments = template_arguments(template)

    from outrider.cluster.request_options import check_options

    check_options(loaded, sampling, draft, acceptance)
    with running_engine(loaded) as engine:
        all_answered = _converse(engine, system, sampling, draft, acceptance, arguments)
    # Who sits at a terminal has seen it and gone on.
    if not all_answered and not Console().is_terminal:
        raise typer.Exit(_SOME_REFUSED)


def _converse(
    engine: "Engine",
    system: str,
    sampling: dict[str, object],
    draft: dict[str, object],
    acceptance: dict[str, object],
    template: dict[str, object],
) -> bool:
    """Until the user leaves. Returns whether every question was answered."""
    all_answered = True
    console, notes = Console(), Console(stderr=True)
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    if console.is_terminal:
        notes.print(_HELP, style="dim")
        console.print(legend(acceptance))
    while True:
        try:
            line = input("> " if console.is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return all_answered
        if line == "/exit":
            return all_answered
        if line == "/new":
            messages = list(first)
            continue
        if not line:
            continue
        question = {"role": "user", "content": line}
        try:
            pieces = engine.stream([*messages, question], sampling, draft, acceptance, template)
            answer = show_stream(console, pieces)
        except ValueError as error:
            # The conversation as it was before the question is still good.
            say_error(f"{error}; /new starts over")
            all_answered = False
            continue
        except KeyboardInterrupt:
            typer.echo("(interrupted)", err=True)
            continue
        if answer.error:
            say_error(answer.error)
            all_answered = False
            continue
        messages += [question, {"role": "assistant", "content": answer.text}]
        if notes.is_terminal:
            notes.print(summary(answer), style="dim", highlight=False)
