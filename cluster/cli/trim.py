"""`outrider trim`: an LM head with the tokens that the target writes, and no others."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from outrider.cluster.bench.machine import num_cpus

if TYPE_CHECKING:
    from outrider.workers.draft_heads.lm_head import LmHead
    from outrider.workers.training.head_source import HeadTexts

Kind = Literal["model", "eagle3", "medusa", "mtp", "parallel"]
Dtype = Literal["bfloat16", "float32"]
CACHE = "~/.cache/outrider/models"
ROWS = (1, 8)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A drafter: as draft.model; with another --of a folder, shipped:NAME or a Hugging Face id.",
    ),
]
Of = Annotated[Kind, typer.Option(help="What SOURCE is: a small LM, or draft heads of this method.")]
Texts = Annotated[
    list[str],
    typer.Option(metavar="DIR", help="Texts of `outrider distill`; may be repeated.", show_default=False),
]
Out = Annotated[str, typer.Option(metavar="DIR", help="Where the checkpoint goes.")]
StoredDtype = Annotated[Dtype, typer.Option(help="Of the weights that are written.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: the CPUs this process may use.", min=0)]
CacheDir = Annotated[str, typer.Option(help="As cluster.model_cache_dir.")]


def trim(
    source: Source,
    out: Out,
    texts: Texts = [],
    of: Of = "model",
    size: Annotated[int, typer.Option(help="Keep so many tokens; 0: go by --coverage.", min=0)] = 0,
    coverage: Annotated[
        float,
        typer.Option(help="Keep the fewest tokens that have this fraction of the text.", min=0.0, max=1.0),
    ] = 0.0,
    low_ids: Annotated[
        int,
        typer.Option(
            help="Keep so many lowest ids in any case: the commonest of a BPE, text seen or not.", min=0
        ),
    ] = 0,
    dtype: StoredDtype = "bfloat16",
    threads: Threads = 1,
    cache_dir: CacheDir = CACHE,
) -> None:
    """Keep the tokens that the target writes most often, counted on all texts but the last tenth."""
    if bool(size) == bool(coverage):
        raise ValueError("trim must get one of --size and --coverage, greater than 0")

    from outrider.cluster.coverage_chart import draw_coverage
    from outrider.workers.draft_heads import trim as trimming
    from outrider.workers.setup import torch_dtype
    from outrider.workers.training.head_source import (
        end_ids_of,
        open_heads,
        read_head_texts,
        trimmed_heads,
        write_heads,
    )
    from outrider.workers.weights.progress import silent

    threads = threads or num_cpus()
    begin = time.perf_counter()
    typer.echo("reading texts", err=True)
    corpus = read_head_texts(texts, 0)
    cache = Path(cache_dir).expanduser()
    target, ends = end_ids_of(corpus, cache, silent)
    counts, held_out = (
        trimming.count_tokens([text.output_tokens for text in part], target.vocab_size)
        for part in (corpus.used, corpus.held_out)
    )
    order = trimming.token_order(counts, ends, min(low_ids, target.vocab_size))
    chosen = size or order.size_for(counts, coverage)
    ids = order.first(chosen)
    typer.echo("reading the head", err=True)
    checkpoint = open_heads(of, source, corpus, target, cache, silent)
    kept = trimmed_heads(checkpoint, ids)
    full, small = checkpoint.lm_heads[0], kept.lm_heads[0]
    folder = Path(out).expanduser()
    write_heads(folder, kept, torch_dtype(dtype))
    (folder / "ids.json").write_text(json.dumps(small.ids.tolist()) + "\n", encoding="utf-8")
    curves = {"counted text": order.coverages(counts), "other text": order.coverages(held_out)}
    sizes = _sizes(order.num_always, target.vocab_size)
    at = {name: [float(curve[size - 1]) for size in sizes] for name, curve in curves.items()}
    draw_coverage(
        sizes,
        at,
        chosen,
        f"{corpus.num_tokens} tokens of {corpus.description.model}",
        folder / "coverage.png",
    )
    measured = {
        "size": len(small.ids),
        "coverage_counted": trimming.coverage(counts, small.ids),
        "coverage_held_out": trimming.coverage(held_out, small.ids),
        **head_times(full, small, dtype, threads),
    }
    settings = {
        "source": source,
        "of": of,
        "size": size,
        "coverage": coverage,
        "low_ids": low_ids,
        "dtype": dtype,
    }
    write_provenance(folder, corpus, settings, measured, 0, 0.0, 0, time.perf_counter() - begin, threads)
    typer.echo(
        f"{folder}: {measured['size']} of {target.vocab_size} tokens, which are "
        f"{measured['coverage_counted']:.2%} of the counted text and {measured['coverage_held_out']:.2%} of other "
        f"text ({folder / 'coverage.png'})"
    )
    say_times(measured)


def head_times(full: "LmHead", small: "LmHead", dtype: str, threads: int) -> dict[str, object]:
    """Milliseconds of two heads for `ROWS` rows, measured here one after the other."""
    from outrider.workers.setup import torch_dtype
    from outrider.workers.training.head_time import head_times_ms

    typer.echo("measuring heads", err=True)
    both = {
        name: head_times_ms(head, ROWS, torch_dtype(dtype), threads)
        for name, head in (("full", full), ("new", small))
    }
    return {f"{name}_head_ms": dict(zip(map(str, ROWS), times, strict=True)) for name, times in both.items()}


def say_times(measured: dict[str, object]) -> None:
    """One line per number of rows."""
    full, new = measured["full_head_ms"], measured["new_head_ms"]
    assert isinstance(full, dict)
    assert isinstance(new, dict)
    for rows in full:
        typer.echo(
            f"head, {rows} row{'s' if rows != '1' else ''}: {full[rows]:.2f} ms before, {new[rows]:.2f} ms now: "
            f"{full[rows] / new[rows]:.1f} times as fast; a draft step is {full[rows] - new[rows]:.2f} ms shorter"
        )


def write_provenance(
    folder: Path,
    corpus: "HeadTexts",
    settings: dict[str, object],
    measured: dict[str, object],
    step: int,
    passes: float,
    seed: int,
    seconds: float,
    threads: int,
) -> None:
    """provenance.json beside a checkpoint."""
    from outrider.workers.training import provenance

    provenance.Provenance(
        command=provenance.command(),
        commit=provenance.commit(),
        versions=provenance.versions(),
        config=settings,
        texts_sha256=corpus.digest,
        num_texts=len(corpus.used),
        num_tokens=corpus.num_tokens,
        num_held_out=len(corpus.held_out),
        seed=seed,
        step=step,
        passes=passes,
        hours=seconds / 3600,
        machine=provenance.machine(threads),
        measured=measured,
    ).write(folder)


def _sizes(least: int, most: int) -> list[int]:
    """For a curve: 64 sizes, each so many times the one before."""
    least = max(1, least)
    ratio = (most / least) ** (1 / 63)
    return sorted({min(most, round(least * ratio**index)) for index in range(64)})
