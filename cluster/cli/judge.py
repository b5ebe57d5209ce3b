"""`outrider judge`: from labels to a judge, and what it is worth."""

import typer

from outrider.cluster.cli.judge_eval import evaluate
from outrider.cluster.cli.judge_label import label
from outrider.cluster.cli.judge_records import records
from outrider.cluster.cli.judge_train import train

judge = typer.Typer(
    name="judge",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Make labels, train a judge on them, and measure what it costs and gains.",
)
judge.command("records")(records)
judge.command("label")(label)
judge.command("train")(train)
judge.command("eval")(evaluate)
