"""`outrider judge train`: a judge for a target, from labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from outrider.cluster.cli.inputs import open_model, tokenizer_digest
from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.cluster.judging.training import TrainedJudge

Kind = Literal["target", "target_and_draft"]
Learned = Literal["all", "mismatches"]


def train(
    config: ConfigName,
    labels: Annotated[
        list[str], typer.Option(metavar="DIR", help="What `judge label` wrote; may be repeated.")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where rows, judge and pictures go.")],
    overrides: Overrides = [],
    kind: Annotated[
        Kind,
        typer.Option(
            help="Rows it reads: the target's (Judge Decoding), or the draft model's too (AutoJudge)."
        ),
    ] = "target",
    learned: Annotated[
        Learned,
        typer.Option(help="Labelled tokens it is fitted to: all, or where the target says another one."),
    ] = "all",
    recall: Annotated[
        float,
        typer.Option(help="Harmful tokens that its threshold refuses, as a fraction.", min=0.0, max=1.0),
    ] = 0.9,
    draft_length: Annotated[
        int, typer.Option(help="Of the chain whose acceptance length is expected.", min=1)
    ] = 16,
    tasks: Annotated[
        list[str],
        typer.Option(help="What it is for, in words; may be repeated. Default: the domains of the labels."),
    ] = [],
    seed: Annotated[int, typer.Option(help="Of the split into problems.", min=0)] = 0,
) -> None:
    """Fit a linear judge, calibrate it, and measure it on problems that it has not seen. Rows are kept."""
    loaded = load_config(config, overrides)
    if kind == "target_and_draft" and not loaded.draft.model:
        raise ValueError("draft.model must be set for --kind target_and_draft: its rows are read")

    from outrider.cluster.judging.training import JudgePlan, read_all_labels, train_judge

    model = open_model(loaded)
    folders = [Path(folder).expanduser() for folder in labels]
    texts = read_all_labels(folders, model.vocab_size, tokenizer_digest(model.tokenizer))
    named = tuple(tasks) or tuple(sorted({text.domain for text in texts}))
    plan = JudgePlan(kind, learned, recall, draft_length, seed, named)
    directory = Path(out).expanduser()
    console = Console(stderr=True)
    with progress_bars(console, MofNCompleteColumn(), TimeRemainingColumn()) as bars:
        bar = bars.add_task("hidden rows", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        def state() -> str:
            task = bars.tasks[0]
            return f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f}"

        with signs_of_life(console, state):
            found = train_judge(loaded, texts, model.tokenizer, plan, directory, show)
    _say(found, directory)


def _say(found: "TrainedJudge", directory: Path) -> None:
    typer.echo(f"held out: {found.num_harmful} harmful and {found.num_harmless} harmless mismatches")
    for name, quality in found.qualities.items():
        typer.echo(
            f"{name:12s} AUC {quality.auc:.3f} [{quality.auc_low:.3f}, {quality.auc_high:.3f}], "
            f"average precision {quality.precision:.3f}"
        )
    typer.echo("threshold  harmful refused  harmless kept  expected acceptance length")
    for row in found.table:
        length = f"{row.acceptance_length:.2f} ({row.speed:.2f}x)" if row.acceptance_length else "not mined"
        mark = " <-" if row.threshold == found.threshold else ""
        typer.echo(f"{row.threshold:9g}  {row.harmful_recall:15.1%}  {row.benign_kept:13.1%}  {length}{mark}")
    typer.echo(f"judge, provenance, curves: {directory / 'judge'}; its threshold is {found.threshold:g}")
