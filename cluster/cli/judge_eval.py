"""`outrider judge eval`: rules of acceptance on tasks, what they gain and what they cost."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from outrider.cluster.cli.inputs import describe_run, file_digest, open_model
from outrider.cluster.cli.options import ConfigName, Instruction, MaxTokens, Overrides
from outrider.cluster.cli.start import running_engine
from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.configs.acceptance import AcceptanceConfig, JudgeConfig, RuleName
from outrider.configs.loader import load_config
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.cluster.judging.evaluation import ModeFigures

_RULES: tuple[RuleName, ...] = ("exact", "typical", "judge")


def evaluate(
    config: ConfigName,
    tasks: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="GSM8K, HumanEval or MBPP rows, .jsonl; may be repeated."),
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Answers, table and picture; a run that was cut off goes on.")
    ],
    overrides: Overrides = [],
    rules: Annotated[
        str, typer.Option(help="Comma-separated: exact, typical, judge.")
    ] = "exact,typical,judge",
    judge: Annotated[
        str,
        typer.Option(
            metavar="JUDGE",
            help="A folder, a Hugging Face id or shipped:NAME; default: that of acceptance.judges.",
            show_default=False,
        ),
    ] = "",
    thresholds: Annotated[str, typer.Option(help="Of the judge, comma-separated.")] = "0.5,0.7,0.9,0.97",
    epsilons: Annotated[str, typer.Option(help="Of typical acceptance, comma-separated.")] = "0.09,0.3",
    limit: Annotated[int, typer.Option(help="Tasks of each file, spread over it; 0: all.", min=0)] = 0,
    concurrency: Annotated[int, typer.Option(help="Tasks at a time.", min=1)] = 1,
    instruction: Instruction = "",
    max_tokens: MaxTokens = None,
) -> None:
    """Answer tasks under rules of acceptance: accuracy with intervals, acceptance length, speed."""
    wanted = _rules(rules)
    loaded = load_config(config, overrides)
    at = _fractions("thresholds", thresholds) if "judge" in wanted else ()
    eps = _fractions("epsilons", epsilons) if "typical" in wanted else ()
    loaded = replace(loaded, acceptance=_acceptance(loaded, wanted, judge, at, eps))

    from outrider.cluster.cli.judge_label import read_task_files
    from outrider.cluster.judging import evaluation
    from outrider.cluster.request_options import check_options
    from outrider.workers.training.lines import LineWriter

    num_tokens = loaded.sampling.max_tokens if max_tokens is None else max_tokens
    sampling: dict[str, object] = {"max_tokens": num_tokens}
    name = loaded.acceptance.judges[0].name if "judge" in wanted else ""
    digest = _judge_digest(loaded)
    asked = evaluation.modes(wanted, at, eps, name, digest)
    for mode in asked:
        check_options(loaded, sampling, {}, mode.acceptance)
    found = read_task_files(tasks, limit, instruction)
    model = open_model(loaded)
    settings: dict[str, Any] = {
        "tasks": {Path(path).name: file_digest(path) for path in tasks},
        "instruction": instruction,
        "sampling": asdict(loaded.sampling) | sampling,
        "draft": asdict(loaded.draft),
        "tree": asdict(loaded.tree),
        "concurrency": concurrency,
    }
    directory = Path(out).expanduser()
    described = describe_run(loaded, model, json.loads(json.dumps(settings)))
    with LineWriter(directory, evaluation.ANSWERS, described) as writer:
        places = {(task.id, mode.name, mode.judge) for task in found for mode in asked}
        done = [outcome for outcome in evaluation.read_outcomes(directory) if outcome.place in places]
        total = len(places)
        console = Console(stderr=True)
        if len(done) < total:
            with (
                running_engine(loaded) as engine,
                progress_bars(console, MofNCompleteColumn(), TimeRemainingColumn()) as bars,
            ):
                bar = bars.add_task("answers", total=total, completed=len(done))

                def state() -> str:
                    return f"judge eval: {bars.tasks[0].completed:.0f} of {total} answers"

                with signs_of_life(console, state):
                    done = evaluation.evaluate(
                        engine,
                        found,
                        asked,
                        model.tokenizer,
                        sampling,
                        concurrency,
                        writer,
                        done,
                        lambda: bars.advance(bar),
                    )
    _report(evaluation.figures(done, asked), settings | {"judge": digest}, directory)


def _report(figures: "list[ModeFigures]", settings: dict[str, Any], directory: Path) -> None:
    from outrider.cluster.judge_chart import TradeOffPoint, draw_trade_off
    from outrider.cluster.judging.evaluation import markdown
    from outrider.workers.training import provenance

    table = markdown(figures)
    (directory / "results.md").write_text(table, encoding="utf-8")
    report = {
        "command": provenance.command(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "settings": settings,
        "modes": [asdict(mode) for mode in figures],
    }
    (directory / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    points = [
        TradeOffPoint(
            mode.rule,
            mode.mode,
            mode.acceptance_length,
            mode.accuracy.value,
            mode.accuracy.low,
            mode.accuracy.high,
        )
        for mode in figures
    ]
    draw_trade_off(points, f"{figures[0].num_tasks} tasks", directory / "trade-off.png")
    typer.echo(table, nl=False)
    typer.echo(f"table, figures, picture: {directory / 'results.md'}, results.json, trade-off.png")


def _acceptance(
    config: Config,
    rules: tuple[RuleName, ...],
    judge: str,
    thresholds: tuple[float, ...],
    epsilons: tuple[float, ...],
) -> AcceptanceConfig:
    """As lossy as what is asked for, no more."""
    judges = config.acceptance.judges
    if "judge" not in rules:
        judges = ()
    elif judge:
        folder = Path(judge).expanduser()
        judges = (JudgeConfig("judge", str(folder.resolve()) if folder.exists() else judge),)
    elif len(judges) != 1:
        raise ValueError(f"--judge must be given unless acceptance.judges has one, got {len(judges)}")
    return AcceptanceConfig(
        rules=rules,
        judges=judges,
        min_epsilon=min(epsilons, default=1.0),
        min_delta=min(epsilons, default=1.0) ** 0.5,
        min_threshold=min(thresholds, default=1.0),
    )


def _judge_digest(config: Config) -> str:
    """What of a judge decides its answers."""
    if not config.acceptance.judges:
        return ""
    weights = Path(config.acceptance.judges[0].model) / "judge.safetensors"
    return file_digest(str(weights)) if weights.is_file() else config.acceptance.judges[0].model


def _rules(text: str) -> tuple[RuleName, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in _RULES]
    if unknown or not names:
        raise ValueError(f"--rules must be among {', '.join(_RULES)}; got {text!r}")
    return tuple(rule for rule in _RULES if rule == "exact" or rule in names)


def _fractions(option: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--{option} must be numbers such as 0.5,0.9; got {text!r}") from error
    if not all(0 < value <= 1 for value in found):
        raise ValueError(f"--{option} must be more than 0 and at most 1, got {text!r}")
    return found
