"""`outrider judge label`: which tokens of which texts are good, and which are harmful."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

from outrider.cluster.cli.inputs import describe_run, file_digest, open_model
from outrider.cluster.cli.options import ConfigName, Instruction, MaxTokens, Overrides
from outrider.cluster.cli.start import running_engine
from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.cluster.judging.mining import DraftModelChooser, Yield
    from outrider.configs.schema import Config
    from outrider.workers.training.judges.labels import LabelWriter
    from outrider.workers.training.judges.tasks import Task


def label(
    config: ConfigName,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where the labels go; a run that was cut off goes on.")
    ],
    overrides: Overrides = [],
    records: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Label these: right and wrong answers with the mistake marked, .jsonl; may be repeated.",
            show_default=False,
        ),
    ] = [],
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Mine these: GSM8K, HumanEval or MBPP rows, .jsonl; may be repeated.",
            show_default=False,
        ),
    ] = [],
    limit: Annotated[int, typer.Option(help="Tasks of each file, spread over it; 0: all.", min=0)] = 0,
    instruction: Instruction = "",
    max_tokens: MaxTokens = None,
    max_mismatches: Annotated[int, typer.Option(help="Mismatches of a task, at most.", min=1)] = 64,
    concurrency: Annotated[
        int, typer.Option(help="Tasks in flight; 0: as many as rounds.max_sequences.", min=0)
    ] = 0,
) -> None:
    """Label tokens, from marked mistakes or by trying a drafter's mismatches. A run that was cut off goes on."""
    loaded = load_config(config, overrides)

    from outrider.cluster.request_options import check_options
    from outrider.workers.training.judges.labels import LabelWriter

    if bool(records) == bool(tasks):
        raise ValueError("judge label must get either --records or --tasks")
    if tasks and not loaded.draft.model:
        raise ValueError("draft.model must be set for --tasks: its mismatches with the target are tried")
    num_tokens = loaded.sampling.max_tokens if max_tokens is None else max_tokens
    check_options(loaded, {"max_tokens": num_tokens}, {})
    for name in (*records, *tasks):
        if not Path(name).expanduser().is_file():
            raise ValueError(
                f"--{'records' if records else 'tasks'} must be a .jsonl file, got {name!r} (no such file)"
            )
    model = open_model(loaded)
    settings: dict[str, Any] = {"records": {}, "tasks": {}, "dtype": loaded.target.dtype}
    if records:
        settings["records"] = {Path(name).name: file_digest(name) for name in records}
    else:
        settings["tasks"] = {Path(name).name: file_digest(name) for name in tasks}
        settings |= {"draft": loaded.draft.model, "max_tokens": num_tokens, "max_mismatches": max_mismatches}
        settings["instruction"] = instruction
    directory = Path(out).expanduser()
    with LabelWriter(directory, describe_run(loaded, model, settings)) as writer:
        if records:
            _label_records(records, model.tokenizer, directory, writer)
        else:
            found = read_task_files(tasks, limit, instruction)
            _mine(loaded, found, model, directory, writer, num_tokens, max_mismatches, concurrency)


def _label_records(files: list[str], tokenizer: Any, directory: Path, writer: "LabelWriter") -> None:
    from outrider.workers.training.judges.labels import BAD, GOOD, iter_labels, texts_of
    from outrider.workers.training.judges.records import read_records

    done = {text.id for text in iter_labels(directory)}
    for name in files:
        for record in read_records(Path(name).expanduser()):
            for text in texts_of(record, tokenizer):
                if text.id not in done:
                    writer.write(text)
    texts = list(iter_labels(directory))
    good, bad = (sum(text.labels.count(label) for text in texts) for label in (GOOD, BAD))
    typer.echo(f"{directory}: {len(texts)} texts, {good} good and {bad} bad tokens")


def read_task_files(files: list[str], limit: int, instruction: str) -> "list[Task]":
    """Tasks of several files; with a sandbox where they have code. instruction: empty: the usual one."""
    from outrider.workers.training.judges.sandbox import Limits, Sandbox
    from outrider.workers.training.judges.tasks import INSTRUCTION, has_code, read_tasks, spread

    paths = [Path(name).expanduser() for name in files]
    sandbox = Sandbox.open(Limits()) if any(map(has_code, paths)) else None
    if sandbox is not None:
        typer.echo(f"programs run in a sandbox of the kind {sandbox.way}", err=True)
    below = instruction or INSTRUCTION
    return [task for path in paths for task in spread(read_tasks(path, sandbox, below), limit)]


def _mine(
    config: "Config",
    tasks: "list[Task]",
    model: Any,
    directory: Path,
    writer: "LabelWriter",
    max_tokens: int,
    max_mismatches: int,
    concurrency: int,
) -> None:
    from outrider.cluster.judging.mining import Miner, Yield, mine, recall

    found = Yield(len(tasks))
    done = recall(directory, found)
    todo = [task for task in tasks if task.id not in done]
    if todo:
        with running_engine(config) as engine, _shown(found) as show:
            miner = Miner(
                engine,
                _chooser(config, model.vocab_size),
                model.tokenizer,
                frozenset(model.stop_token_ids),
                max_tokens,
                max_mismatches,
            )
            mine(todo, miner.mine, writer, found, concurrency or config.rounds.max_sequences, show)
    typer.echo(f"{directory}: {found.summary()}")


def _chooser(config: "Config", vocab_size: int) -> "DraftModelChooser":
    from outrider.cluster.judging.mining import DraftModelChooser
    from outrider.workers.setup import load_model, torch_dtype, with_draft_dtype
    from outrider.workers.training.features import TargetFeatures
    from outrider.workers.weights.progress import silent

    config = with_draft_dtype(config, "cpu")
    source = load_model(config, "draft", silent)
    last = (source.config.num_layers,)
    model = TargetFeatures(source, last, torch_dtype(config.draft.dtype), config.draft.num_threads)
    return DraftModelChooser(model, vocab_size)


@contextmanager
def _shown(found: "Yield") -> "Iterator[Any]":
    """A bar on a terminal, a line now and then off it; gives what to call after each task."""
    console = Console(stderr=True)
    with progress_bars(console, TaskProgressColumn(), TimeRemainingColumn(), TimeElapsedColumn()) as bars:
        bar = bars.add_task("judge label", total=1.0)
        bars.update(bar, completed=found.fraction)
        with signs_of_life(console, found.summary):
            yield lambda: bars.update(bar, completed=found.fraction, description=found.summary())
