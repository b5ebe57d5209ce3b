"""`outrider distill`: text that the target writes, for training drafters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import TaskProgressColumn, TextColumn, TimeElapsedColumn

from outrider.cluster.cli.hidden_rows import HiddenRows
from outrider.cluster.cli.inputs import describe_run, file_digest, open_model
from outrider.cluster.cli.options import ConfigName, MaxTokens, Overrides, Plain, draft_options
from outrider.cluster.cli.start import running_engine
from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.configs.loader import load_config
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.cluster.bench.prompts import Prompt
    from outrider.cluster.distillation.run import Tally

HiddenDtype = Literal["target", "bfloat16"]
Styles = Literal["chat", "raw", "both"]
_TEMPLATES = {"chat": (True,), "raw": (False,), "both": (True, False)}


def distill(
    config: ConfigName,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where the texts go; a run that was cut off goes on.")
    ],
    overrides: Overrides = [],
    prompts: Annotated[
        list[str],
        typer.Option(
            metavar="FILE", help="Answer these: .jsonl or .txt; may be repeated.", show_default=False
        ),
    ] = [],
    style: Annotated[
        Styles, typer.Option(help="Of the prompts: through the chat template, raw, or both.")
    ] = "chat",
    temperatures: Annotated[
        str, typer.Option(help="Comma-separated: prompts are answered at each, written ones in turn.")
    ] = "0,0.6,1",
    free: Annotated[int, typer.Option(help="Texts whose prompts the target writes itself.", min=0)] = 0,
    begun: Annotated[
        int, typer.Option(help="Texts whose prompts the target writes from --beginnings on.", min=0)
    ] = 0,
    beginnings: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Beginnings of users' messages, .txt or .jsonl.", show_default=False
        ),
    ] = "",
    raw: Annotated[int, typer.Option(help="Texts that continue --raw-beginnings as they stand.", min=0)] = 0,
    raw_beginnings: Annotated[
        str, typer.Option(metavar="FILE", help="Beginnings of raw text, .txt or .jsonl.", show_default=False)
    ] = "",
    tokens: Annotated[
        int, typer.Option(help="End after so many output tokens; 0: with all texts.", min=0)
    ] = 0,
    max_tokens: MaxTokens = None,
    max_prompt_tokens: Annotated[
        int, typer.Option(help="Longest prompt that the target writes.", min=1)
    ] = 256,
    similarity: Annotated[
        float,
        typer.Option(help="Drop answers as similar to another as this (Jaccard, 5-grams).", min=0.1, max=1.0),
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Same seed, same texts.", min=0)] = 0,
    concurrency: Annotated[
        int, typer.Option(help="Texts in flight; 0: half more than rounds.max_sequences.", min=0)
    ] = 0,
    with_text: Annotated[bool, typer.Option("--with-text", help="Keep the decoded answers, too.")] = False,
    plain: Plain = False,
    keep_hidden: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            help="Then keep the target's hidden rows of all texts: medusa, eagle3, or layers such as 2,15,27.",
            show_default=False,
        ),
    ] = "",
    hidden_dtype: Annotated[
        HiddenDtype, typer.Option(help="Of the kept rows; target: as target.dtype.")
    ] = "target",
    yes: Annotated[
        bool, typer.Option("--yes", help="Keep hidden rows without asking about their size.")
    ] = False,
) -> None:
    """Let the target write texts. Ended in any way, the same command goes on where it was."""
    loaded = load_config(config, overrides)

    from outrider.cluster.distillation.plan import Plan
    from outrider.cluster.distillation.run import Answerer, Judge, Tally, recall
    from outrider.cluster.distillation.run import distill as work_through
    from outrider.cluster.distillation.template import user_turn
    from outrider.cluster.request_options import check_options
    from outrider.workers.training.texts import TextWriter

    num_tokens = loaded.sampling.max_tokens if max_tokens is None else max_tokens
    draft = draft_options(plain, [], None, None)
    plan = Plan(
        prompts=_named(prompts),
        temperatures=_temperatures(temperatures),
        templates=_TEMPLATES[style],
        num_free=free,
        num_begun=begun,
        beginnings=_beginnings("begun", begun, "beginnings", beginnings),
        num_raw=raw,
        raw_beginnings=_beginnings("raw", raw, "raw-beginnings", raw_beginnings),
    )
    if not plan.num_texts:
        raise ValueError("distill must get at least one of --prompts, --free, --begun and --raw")
    for temperature in plan.temperatures:
        check_options(loaded, {"temperature": temperature, "max_tokens": num_tokens}, draft)
    check_options(loaded, {"max_tokens": max_prompt_tokens}, {})
    model = open_model(loaded)
    turn = user_turn(model.tokenizer) if free or begun else None
    hidden = HiddenRows(loaded, keep_hidden, hidden_dtype, yes) if keep_hidden else None
    settings = {
        "prompts": {name: file_digest(path) for name, path in zip(plan.prompts, prompts, strict=True)},
        "style": style,
        "temperatures": list(plan.temperatures),
        "beginnings": file_digest(beginnings),
        "raw_beginnings": file_digest(raw_beginnings),
        "max_tokens": num_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "similarity": similarity,
        "seed": seed,
        "dtype": loaded.target.dtype,
        "sampling": _other_sampling(loaded),
    }
    judge, tally = Judge(similarity), Tally(plan.num_texts, tokens)
    directory = Path(out).expanduser()
    with TextWriter(directory, describe_run(loaded, model, settings)) as writer:
        done = recall(directory, judge, tally)
        todo = (task for task in plan.tasks() if task.id not in done)
        if tally.fraction < 1.0:
            if hidden is not None:
                hidden.announce(tokens or plan.num_texts * num_tokens)
            with running_engine(loaded) as engine, _shown(tally) as show:
                answerer = Answerer(
                    engine, model.tokenizer, turn, seed, num_tokens, max_prompt_tokens, draft, with_text
                )
                in_flight = concurrency or -(-3 * loaded.rounds.max_sequences // 2)
                work_through(todo, answerer.answer, writer, judge, tally, in_flight, show)
        typer.echo(f"{directory}: {_summary(tally)}")
        if hidden is not None:
            hidden.keep(directory)


@contextmanager
def _shown(tally: "Tally") -> "Iterator[Any]":
    """A bar on a terminal, a line now and then off it; gives what to call after each text."""
    console = Console(stderr=True)
    tally.restart()

    def state() -> str:
        return f"{_summary(tally)}; {tally.tokens_per_s:.0f} tokens/s, {_duration(tally.remaining_s)} left"

    columns = (TaskProgressColumn(), TextColumn("{task.fields[left]} left"), TimeElapsedColumn())
    with progress_bars(console, *columns) as bars, signs_of_life(console, state):
        bar = bars.add_task("distill", total=1.0, left=_duration(tally.remaining_s))

        def show() -> None:
            bars.update(
                bar,
                completed=tally.fraction,
                left=_duration(tally.remaining_s),
                description=f"{_summary(tally)}, {tally.tokens_per_s:.0f} tokens/s",
            )

        yield show


def _summary(tally: "Tally") -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in tally.num_dropped.most_common())
    return f"{tally.num_texts} texts, {tally.num_tokens} tokens" + (
        f"; dropped: {dropped}" if dropped else ""
    )


def _duration(seconds: float) -> str:
    """As h:mm, or unknown."""
    if seconds == float("inf"):
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _other_sampling(config: Config) -> dict[str, Any]:
    """What the config says of every request that is not said per text."""
    said = {"temperature", "max_tokens", "seed"}
    return {name: value for name, value in asdict(config.sampling).items() if name not in said}


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        temperatures = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--temperatures must be numbers such as 0,0.6,1; got {text!r}") from error
    if len(set(temperatures)) < len(temperatures):
        raise ValueError(f"--temperatures must be different ones, got {text!r}")
    return temperatures


def _named(paths: Sequence[str]) -> "dict[str, Sequence[Prompt]]":
    """The prompts of each file, by its name."""
    files: dict[str, Sequence[Prompt]] = {}
    for path in paths:
        name = Path(path).stem
        if name in files:
            raise ValueError(f"--prompts must be files of different names, got {name!r} twice")
        files[name] = _load("prompts", path)
    return files


def _beginnings(count_option: str, count: int, option: str, path: str) -> "Sequence[Prompt]":
    if bool(count) != bool(path):
        raise ValueError(f"--{count_option} and --{option} must come together")
    return _load(option, path) if path else []


def _load(option: str, path: str) -> "Sequence[Prompt]":
    from outrider.cluster.bench.prompts import load_prompts

    if not Path(path).expanduser().is_file():
        raise ValueError(f"--{option} must be a .jsonl or .txt file, got {path!r}")
    return load_prompts(path)
