"""`outrider slim`: an LM head of low rank, fitted to the target's law."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

from outrider.cluster.bench.machine import num_cpus
from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.cluster.cli.trim import (
    CACHE,
    CacheDir,
    Of,
    Out,
    Source,
    StoredDtype,
    Texts,
    Threads,
    head_times,
    say_times,
    write_provenance,
)

Teacher = Literal["target", "own"]


def slim(
    source: Source,
    out: Out,
    texts: Texts = [],
    of: Of = "model",
    teacher: Annotated[
        Teacher,
        typer.Option(
            help="Whose law is learned: the target's, as in SlimSpec, or a small LM's own full head's."
        ),
    ] = "target",
    divisor: Annotated[int, typer.Option(help="The rank is the hidden size by this.", min=2)] = 8,
    passes: Annotated[int, typer.Option(help="How often the texts are read.", min=1)] = 4,
    batch_rows: Annotated[int, typer.Option(help="Tokens of an optimizer step.", min=1)] = 512,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, falling by a cosine.", min=0.0)] = 4e-4,
    steps: Annotated[
        int, typer.Option(help="Steps that an EAGLE-3 drafter or an MTP head is unrolled.", min=1)
    ] = 5,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="Learn from so many tokens of the texts; 0: all. Their rows are kept in memory.", min=0
        ),
    ] = 200_000,
    compute_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Of the models whose rows are read; auto: bfloat16 where the CPU multiplies it."),
    ] = "auto",
    dtype: StoredDtype = "bfloat16",
    seed: Annotated[int, typer.Option(help="Same seed, same head.", min=0)] = 0,
    threads: Threads = 0,
    cache_dir: CacheDir = CACHE,
) -> None:
    """Give a drafter LM heads of two small matrices: a weighted SVD, then distilled by forward KL."""
    from outrider.workers.draft_heads.lm_head import rank_of
    from outrider.workers.draft_heads.slim import SlimSettings
    from outrider.workers.setup import quick_dtype, torch_dtype
    from outrider.workers.training.head_source import read_head_texts, write_heads
    from outrider.workers.training.slimming import read_slim_data, slim_heads

    if of != "model" and teacher == "own":
        raise ValueError(f"--teacher must be target with --of {of}: draft heads learn the target's law")
    threads = threads or num_cpus()
    computed_in = quick_dtype("cpu") if compute_dtype == "auto" else compute_dtype
    begin = time.perf_counter()
    console = Console(stderr=True)
    corpus = read_head_texts(texts, max_tokens)
    with progress_bars(console, TaskProgressColumn(), TimeRemainingColumn(), TimeElapsedColumn()) as bars:
        bar = bars.add_task("loading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        def state() -> str:
            task = bars.tasks[0]
            return f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f}"

        with signs_of_life(console, state):
            cache = Path(cache_dir).expanduser()
            own = teacher == "own"
            data = read_slim_data(
                of, source, own, corpus, steps, torch_dtype(computed_in), threads, cache, show
            )
            full = data.checkpoint.lm_heads[0]
            hidden_size = full.shape.hidden_size
            if not 2 <= divisor <= hidden_size:
                raise ValueError(f"--divisor must be from 2 to {hidden_size}, got {divisor}")
            rank = rank_of(hidden_size, divisor)
            settings = SlimSettings(rank, passes, batch_rows, learning_rate, seed=seed)
            checkpoint, slimmed = slim_heads(data, settings, show)
    folder = Path(out).expanduser()
    write_heads(folder, checkpoint, torch_dtype(dtype))
    qualities = [{"full": one.full, "start": one.start, "distilled": one.fitted} for one in slimmed]
    measured: dict[str, object] = {
        "rank": rank,
        "lm_heads": [{name: asdict(found) for name, found in of_head.items()} for of_head in qualities],
        **head_times(full, slimmed[0].head, dtype, threads),
    }
    config = {
        "source": source,
        "of": of,
        "teacher": teacher,
        "steps": steps,
        "compute_dtype": computed_in,
        "dtype": dtype,
        **asdict(settings),
    }
    seconds, num_steps = time.perf_counter() - begin, sum(one.num_steps for one in slimmed)
    write_provenance(folder, corpus, config, measured, num_steps, float(passes), seed, seconds, threads)
    typer.echo(f"{folder}: rank {rank} of {hidden_size}, {len(full.ids)} tokens")
    for number, of_head in enumerate(qualities, start=1):
        which = f" {number} of {len(qualities)}" if len(qualities) > 1 else ""
        for name, found in of_head.items():
            typer.echo(
                f"{name} head{which}, {'own' if own else 'target'} law on other text: KL {found.kl:.3f} nats, the "
                f"likeliest token in {found.agreement:.1%}, acceptance {found.acceptance:.1%}"
            )
    say_times(measured)
