"""`outrider table`: several benchmarks as one table in Markdown."""

from typing import Annotated

import typer


def table(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FILE...", help="JSON files of `outrider bench`; NAME: of the drafter."
        ),
    ],
) -> None:
    """Print one table of several benchmarks: acceptance length / speed over plain / over transformers' best."""
    from outrider.cluster.bench.table import markdown, read_bench_file

    typer.echo(markdown([read_bench_file(argument) for argument in files]), nl=False)
