"""`outrider doctor`: what this machine has and what would be used; --gpu: do the kernels run right here?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from outrider.workers.doctor import Fact, check_gpus, environment, num_gpus, usage

NO_GPU = "There is no GPU here that torch can use"
FAILED, NO_GPU_TO_CHECK = 1, 2


def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="Run every kernel check on the GPUs.")] = False,
    report: Annotated[Path, typer.Option(help="Where --gpu writes its JSON report.")] = Path(
        "gpu-report.json"
    ),
) -> None:
    """Print the environment; --gpu checks every kernel on it (exit code 1: a check failed, 2: no GPU)."""
    _print("This machine", environment())
    _print("A run would use", usage())
    if num_gpus() == 0:
        typer.echo(f"\n{NO_GPU}. What the kernels have done on others: docs/gpu-report.md.")
        if gpu:
            raise typer.Exit(NO_GPU_TO_CHECK)
        return
    if not gpu:
        typer.echo("\n`outrider doctor --gpu` checks the kernels on these GPUs.")
        return
    reports = check_gpus()
    report.write_text(json.dumps([found.as_json() for found in reports], indent=1))
    for found in reports:
        typer.echo(f"\n{found.device}: {'passed' if found.passed else 'FAILED'}")
        for case in found.cases:
            bound = f", at least {case.least_time_s * 1e6:.2f}" if case.least_time_s else ""
            typer.echo(f"  {case.name}: {case.time_s * 1e6:.1f} us{bound}")
            for problem in case.problems:
                typer.echo(f"    {problem}")
    typer.echo(f"\nWritten to {report}")
    if not all(found.passed for found in reports):
        raise typer.Exit(FAILED)


def _print(title: str, facts: list[Fact]) -> None:
    typer.echo(f"{title}:")
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        typer.echo(f"  {fact.name:{width}}  {fact.value}")
