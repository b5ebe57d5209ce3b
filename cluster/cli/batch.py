"""`outrider batch`: a file of requests in OpenAI's batch format, answered without a server."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.cluster.cli.start import running_engine
from outrider.cluster.cli.terminal import progress_bars
from outrider.configs.loader import load_config

_SOME_REFUSED = 1


def batch(
    config: ConfigName,
    input_file: Annotated[str, typer.Option("--input", metavar="FILE", help="Requests, one a line.")],
    output_file: Annotated[str, typer.Option("--output", metavar="FILE", help="Answers, one a line.")],
    overrides: Overrides = [],
) -> None:
    """Answer each request of a file once. The same command goes on after a kill."""
    loaded = load_config(config, overrides)

    from outrider.cluster.serving.batch import Batch, Output, read_input

    requests = read_input(Path(input_file))
    output = Output(Path(output_file))
    try:
        strange = output.answered - requests.keys()
        if strange:
            raise ValueError(
                f"--output must have answers to --input alone, it has one to {min(strange)[:100]!r}"
            )
        console = Console(stderr=True)
        num_missing = len(requests) - len(output.answered)
        console.print(f"{len(requests)} requests, {len(output.answered)} answered before")
        refused = 0
        if num_missing:
            with (
                running_engine(loaded) as engine,
                progress_bars(console, MofNCompleteColumn(), TimeElapsedColumn()) as bars,
            ):
                task = bars.add_task("requests", total=num_missing)

                def done(answered: bool) -> None:
                    nonlocal refused
                    refused += not answered
                    bars.advance(task)

                asyncio.run(Batch(engine, loaded).run(requests, output, done))
    finally:
        output.close()
    console.print(f"{num_missing} answered now" + (f", {refused} of them refused" if refused else ""))
    if refused:
        raise typer.Exit(_SOME_REFUSED)
