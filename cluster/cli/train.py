"""`outrider train`: a drafter for a target, from texts that the target wrote."""

from pathlib import Path
from typing import Annotated

import typer

from outrider.cluster.cli.options import Overrides
from outrider.cluster.training_chart import draw_training
from outrider.configs.loader import load_training
from outrider.workers.training.log import EvalLine, Line, TrainLine


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML file or recipe name (smollm2-eagle3, ...).")
    ],
    overrides: Overrides = [],
) -> None:
    """Train draft heads: EAGLE-3, MTP, parallel or Medusa. An interrupted run goes on from its last checkpoint."""
    from outrider.workers.training.launch import train as run

    settings = load_training(config, overrides)
    found = run(settings, typer.echo, _progress, _tell)
    out = Path(settings.out).expanduser()
    draw_training(out, out / "training.png")
    typer.echo(
        f"drafter, provenance: {out / 'drafter'}; curves: {out / 'training.png'}, {out / 'tensorboard'}"
    )
    typer.echo(f"tokens per round of a chain on the held-out texts: {found.acceptance_length:.2f}")


def _progress(what: str, done: int, total: int) -> None:
    typer.echo(f"{what}: {done}" + (f" of {total}" if total else ""), err=True)


def _tell(line: Line) -> None:
    match line:
        case TrainLine():
            typer.echo(
                f"step {line.step}: loss {line.loss:.3f}, acceptance {_percent(line.acceptances)}, "
                f"lr {line.lr:.1e}, {line.tokens_per_s:.0f} tokens/s, pass {line.passes:.2f}, "
                f"{line.left_s / 60:.0f} min to go"
            )
        case EvalLine(measured=found):
            typer.echo(
                f"step {line.step}, held out: top 1 {_percent(found.top(1))}, top 5 {_percent(found.top(5))}, "
                f"{found.acceptance_length:.2f} tokens per round"
            )


def _percent(values: tuple[float, ...]) -> str:
    return " / ".join(f"{100 * value:.0f}" for value in values) + " %"
