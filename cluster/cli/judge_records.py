"""`outrider judge records`: questions with a right and a wrong answer, made from solutions that are right."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from outrider.cluster.cli.terminal import progress_bars, signs_of_life

if TYPE_CHECKING:
    from outrider.workers.training.judges.records import SpanRecord
    from outrider.workers.training.judges.tasks import Coding


def records(
    out: Annotated[str, typer.Option(metavar="FILE", help="Where the records go, .jsonl.")],
    gsm8k: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Word problems as in GSM8K; may be repeated.", show_default=False),
    ] = [],
    programs: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Programs with tests, as in MBPP or HumanEval; may be repeated. They are run, in a sandbox.",
            show_default=False,
        ),
    ] = [],
    limit: Annotated[int, typer.Option(help="Problems of each file, spread over it; 0: all.", min=0)] = 0,
    wrong: Annotated[int, typer.Option(help="Mistakes of a problem, at most.", min=1)] = 6,
    right: Annotated[int, typer.Option(help="Right variations of a problem, at most.", min=0)] = 4,
    seed: Annotated[int, typer.Option(help="Same seed, same records.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Programs that run at a time.", min=1)] = 2,
) -> None:
    """Put mistakes of several kinds into right solutions, and write them otherwise without one.

    Not from files that a judge shall be measured with.
    """
    from outrider.workers.training.judges.records import write_records

    if not gsm8k and not programs:
        raise ValueError("judge records must get at least one of --gsm8k and --programs")
    path = Path(out).expanduser()
    if not path.parent.is_dir() or path.suffix != ".jsonl":
        raise ValueError(f"--out must be a .jsonl file in a folder that exists, got {out!r}")
    tasks = _tasks(programs, limit)
    console = Console(stderr=True)
    kinds: dict[str, int] = {}
    with progress_bars(console, MofNCompleteColumn(), TimeRemainingColumn()) as bars:
        bar = bars.add_task("programs", total=len(tasks))

        def programs_state() -> str:
            return f"programs: {bars.tasks[0].completed:.0f} of {len(tasks)}"

        def made() -> "Iterator[SpanRecord]":
            from outrider.workers.training.judges.programs import program_records

            for file in gsm8k:
                yield from _arithmetic(Path(file).expanduser(), limit, wrong, right, seed)
            for task in tasks:
                yield from program_records(task, wrong, right, seed, threads)
                bars.advance(bar)

        def counted() -> "Iterator[SpanRecord]":
            for record in made():
                kind = f"{record.domain}, {'mistake' if record.wrong else 'right'}: {record.kind}"
                kinds[kind] = kinds.get(kind, 0) + 1
                yield record

        with signs_of_life(console, programs_state):
            count = write_records(path, counted())
    for kind in sorted(kinds):
        typer.echo(f"{kinds[kind]:6d}  {kind}")
    typer.echo(f"{path}: {count} records")


def _arithmetic(path: Path, limit: int, wrong: int, right: int, seed: int) -> "Iterator[SpanRecord]":
    from outrider.workers.training.judges.arithmetic import arithmetic_records
    from outrider.workers.training.judges.tasks import spread
    from outrider.workers.training.lines import read_objects

    if not path.is_file():
        raise ValueError(f"--gsm8k must be a .jsonl file, got {str(path)!r} (no such file)")
    for number, row in spread(list(read_objects(path)), limit):
        for field in ("question", "answer"):
            if not isinstance(row.get(field), str):
                raise ValueError(f"{path}, line {number}: {field} must be a text, got {row.get(field)!r}")
        problem = f"{path.stem}/{number}"
        yield from arithmetic_records(problem, row["question"], row["answer"], wrong, right, seed)


def _tasks(files: list[str], limit: int) -> "list[Coding]":
    if not files:
        return []
    from outrider.workers.training.judges.sandbox import Limits, Sandbox
    from outrider.workers.training.judges.tasks import Coding, read_tasks, spread

    sandbox = Sandbox.open(Limits())
    typer.echo(f"programs run in a sandbox of the kind {sandbox.way}", err=True)
    found = []
    for file in files:
        for task in spread(read_tasks(Path(file).expanduser(), sandbox), limit):
            if not isinstance(task, Coding):
                raise ValueError(f"--programs must hold code with tests, got a word problem in {file}")
            found.append(task)
    return found
