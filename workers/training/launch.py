"""From a configuration to a trained drafter: texts, rows, ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from outrider.configs.loader import config_to_yaml, load_training
from outrider.configs.training import TrainingConfig
from outrider.workers.setup import quick_dtype
from outrider.workers.training.data import Corpus, Manifest, read_corpus
from outrider.workers.training.log import Line
from outrider.workers.training.metrics import Measurement
from outrider.workers.training.tasks import (
    build_task,
    forget_head,
    prepare_head,
    prepare_rows,
    training_device,
)
from outrider.workers.training.trainer import Trainer, has_run
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import resolve_head

_MANIFEST = "texts.json"
_CONFIG = "config.yaml"

# What a run that goes on may have otherwise than it began: none of it decides what the drafter is, nor what of.
_MAY_CHANGE = {
    "out",
    "target.model_cache_dir",
    "texts.features",
    "texts.features_directory",
    "optimizer.steps",
    "engine.num_threads",
    "log_every",
    "eval_every",
    "checkpoint_every",
}


def train(
    config: TrainingConfig, say: Callable[[str], None], progress: Progress, tell: Callable[[Line], None]
) -> Measurement:
    """Trains to the end, going on where an earlier run of the same `out` was interrupted.

    Args:
        say: told what is about to be done.
        progress: told how far the target's rows and downloads are.
        tell: gets the lines of the log.

    Raises:
        ValueError: a setting, a text, a model or a checkpoint that cannot be used.
    """
    config = _with_dtypes(config)
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    _check_goes_on(config, out)
    corpus = open_corpus(config)
    tokens = sum(len(text.tokens) for text in corpus.training)
    (out / _CONFIG).write_text(config_to_yaml(config), encoding="utf-8")
    say(f"{len(corpus.training)} texts of {tokens} tokens, {len(corpus.held_out)} held out")
    if config.start_from:
        resolve_head(config.start_from, progress, "start_from")
    prepare_rows(config, corpus, say, progress)
    prepare_head(config, corpus, say)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "ranks"
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_other_rank, args=(config, rank, rendezvous), daemon=True)
            for rank in range(1, config.engine.ranks)
        ]
        for process in others:
            process.start()
        try:
            return _run_rank(config, corpus, 0, rendezvous, tell)
        finally:
            for process in others:
                process.join(timeout=10)
                process.kill()


def _with_dtypes(config: TrainingConfig) -> TrainingConfig:
    """With dtypes of `auto` decided: they are part of what a run is."""
    target, engine, quick = config.target, config.engine, quick_dtype(config.engine.device)
    if target.dtype == "auto":
        target = replace(target, dtype=quick)
    if engine.dtype == "auto":
        engine = replace(engine, dtype=quick)
    return replace(config, target=target, engine=engine)


def _check_goes_on(config: TrainingConfig, out: Path) -> None:
    """Raises ValueError where `out` has a checkpoint of another run than this one. What one without a checkpoint has
    left there is begun anew."""
    if not has_run(out):
        (out / _MANIFEST).unlink(missing_ok=True)
        forget_head(config)
        return
    try:
        before = load_training(out / _CONFIG)
    except ValueError as error:
        raise ValueError(f"out must be another folder than {out}, whose run cannot go on: {error}") from error
    for field, was, now in _changes(asdict(before), asdict(config)):
        raise ValueError(
            f"out must be another folder, or {field} {was!r} as in the run that {out} has, got {now!r}; "
            f"start_from={out / 'drafter'} begins with what it learned"
        )


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Fields that differ and may not: their names, what they were and are."""
    for name, value in now.items():
        field = prefix + name
        if isinstance(value, Mapping):
            yield from _changes(before[name], value, f"{field}.")
        elif value != before[name] and field not in _MAY_CHANGE:
            yield field, before[name], value


def open_corpus(config: TrainingConfig) -> Corpus:
    """The texts of a run: those that it began with, where it began before."""
    path = Path(config.out).expanduser() / _MANIFEST
    corpus = read_corpus(config.texts, Manifest.read(path) if path.exists() else None)
    corpus.manifest.write(path)
    return corpus


def _run_rank(
    config: TrainingConfig, corpus: Corpus, rank: int, rendezvous: Path, tell: Callable[[Line], None]
) -> Measurement:
    task = build_task(config, corpus, training_device(config, rank))
    trainer = Trainer(config, corpus, task, rank, rendezvous)
    try:
        return trainer.run(tell)
    finally:
        trainer.close()


def _other_rank(config: TrainingConfig, rank: int, rendezvous: Path) -> None:
    _run_rank(config, open_corpus(config), rank, rendezvous, _silent)


def _silent(line: Line) -> None:
    pass
