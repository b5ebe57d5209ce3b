"""From labels to a judge's checkpoint with what it was measured to be worth."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.cluster.judge_chart import draw_curves
from outrider.configs.schema import Config
from outrider.workers.judging.head import JudgeDescription, JudgeKind, ThresholdRow, write_judge
from outrider.workers.judging.identity import identify
from outrider.workers.setup import load_model, torch_dtype, with_draft_dtype
from outrider.workers.training import provenance
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.judges import measures
from outrider.workers.training.judges.fit import (
    Learned,
    fit_judge,
    scores,
    split_by_problem,
    threshold_for,
)
from outrider.workers.training.judges.labels import LabelledText, load_labels, match_rate
from outrider.workers.training.judges.rows import JudgeRowComputer, judge_rows, trees_of
from outrider.workers.weights.progress import Progress, silent
from outrider.workers.weights.source import WeightSource


@dataclass(frozen=True)
class JudgePlan:
    """How a judge is trained.

    Attributes:
        kind: which rows it reads.
        learned: whether it is fitted to all labelled tokens or to mismatches alone.
        recall: fraction of the harmful tokens that the threshold it comes with refuses, on the calibration problems.
        draft_length: of the chain whose acceptance length is expected.
        seed: of the split.
        tasks: what it is for, in words.
    """

    kind: JudgeKind
    learned: Learned
    recall: float
    draft_length: int
    seed: int
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class TrainedJudge:
    """A judge's measures on held-out mismatches.

    Attributes:
        threshold: that it comes with.
        table: what thresholds do.
        qualities: of the judge and of trivial ones, by name, the judge's first.
        num_harmful, num_harmless: held-out mismatches.
    """

    threshold: float
    table: tuple[ThresholdRow, ...]
    qualities: dict[str, measures.Quality]
    num_harmful: int
    num_harmless: int


def read_all_labels(directories: Sequence[Path], vocab_size: int, tokenizer_sha: str) -> list[LabelledText]:
    """Texts of several directories. Raises ValueError where one is of another target's tokens."""
    texts: list[LabelledText] = []
    for directory in directories:
        described, found = load_labels(directory)
        if (described.vocab_size, described.tokenizer) != (vocab_size, tokenizer_sha):
            raise ValueError(
                f"--labels must be of this target's tokens, got those of {described.model} in {directory}"
            )
        texts += found
    if not texts:
        raise ValueError("--labels must hold labelled texts, got none")
    return texts


def train_judge(
    config: Config,
    texts: Sequence[LabelledText],
    tokenizer: Any,
    plan: JudgePlan,
    out: Path,
    progress: Progress,
) -> TrainedJudge:
    """Computes or finds the rows, fits, measures, and writes `out/judge`, `out/features` and pictures.

    Raises:
        ValueError: the labels do not do, see `fit_judge`.
    """
    began = time.perf_counter()
    config = with_draft_dtype(config, "cpu")
    out.mkdir(parents=True, exist_ok=True)
    with_draft = plan.kind == "target_and_draft"
    target = load_model(config, "target", silent)
    draft = load_model(config, "draft", silent) if with_draft else None
    ours = identify(config.target.model, target, tokenizer.chat_template)
    theirs = None if draft is None else identify(config.draft.model, draft, tokenizer.chat_template)
    identity = json.dumps(
        ["judge", ours.fingerprint, config.target.dtype]
        + ([theirs.fingerprint, config.draft.dtype] if theirs is not None else [])
    )
    computer = _computer(config, target, draft)
    rows = judge_rows(trees_of(texts), computer, out / "features", identity, progress)
    split = split_by_problem(rows, plan.seed)
    fitted = fit_judge(split, plan.learned, plan.seed, config.target.num_threads)
    calibrate = split.calibrate.at(split.calibrate.is_mismatch)
    threshold = threshold_for(scores(fitted.head, calibrate.rows), calibrate.is_good, plan.recall)
    thresholds = sorted({*measures.THRESHOLDS, threshold})
    asked = split.held_out.at(split.held_out.is_mismatch)
    scored = scores(fitted.head, asked.rows)
    table = measures.threshold_table(scored, asked, thresholds, match_rate(texts), plan.draft_length)
    by_name = {"judge": scored} | measures.trivial_judges(
        split.train.at(split.train.is_mismatch), asked, lambda token: str(tokenizer.decode([token]))
    )
    qualities = {name: measures.quality(values, asked, plan.seed) for name, values in by_name.items()}
    num_harmful = int((~asked.is_good).sum())
    found = TrainedJudge(threshold, table, qualities, num_harmful, len(asked) - num_harmful)
    measured: dict[str, object] = {
        "qualities": {name: asdict(quality) for name, quality in qualities.items()},
        "thresholds": [asdict(row) for row in table],
        "threshold": threshold,
        "num_harmful": num_harmful,
        "num_harmless": found.num_harmless,
        "num_bad_that_the_target_says": int((~split.held_out.is_good & ~split.held_out.is_mismatch).sum()),
        "num_contradictory": rows.num_contradictory,
        "by_kind": measures.by_group(scored, asked, asked.kinds, threshold),
        "by_domain": measures.by_group(scored, asked, asked.domains, threshold),
        "match_rate": match_rate(texts),
        "draft_length": plan.draft_length,
        "penalty": fitted.penalty,
        "calibration_auc": fitted.auc,
        "num_learned": fitted.num_learned,
        "num_bad": fitted.num_bad,
        "calibration": {"scale": fitted.scale, "shift": fitted.shift},
    }
    record = provenance.Provenance(
        command=provenance.command(),
        commit=provenance.commit(),
        versions=provenance.versions(),
        config={"target": asdict(config.target), "draft": asdict(config.draft), **asdict(plan)},
        texts_sha256=_digest(texts),
        num_texts=len(texts),
        num_tokens=len(rows),
        num_held_out=len(asked),
        seed=plan.seed,
        step=0,
        passes=1.0,
        hours=(time.perf_counter() - began) / 3600,
        machine=provenance.machine(config.target.num_threads),
        measured=measured,
    )
    description = JudgeDescription(
        kind=plan.kind,
        target=ours,
        drafter=theirs,
        threshold=threshold,
        thresholds=table,
        tasks=plan.tasks,
        provenance={"commit": record.commit, "texts_sha256": record.texts_sha256, "seed": plan.seed},
    )
    folder = out / "judge"
    write_judge(folder, fitted.head, description)
    record.write(folder)
    labels = {
        name: f"{name}: AUC {found.auc:.3f} [{found.auc_low:.3f}, {found.auc_high:.3f}]"
        for name, found in qualities.items()
    }
    title = f"{num_harmful} harmful and {found.num_harmless} harmless held-out mismatches of {config.target.model}"
    drawn = {name: measures.curves(values, asked.is_good) for name, values in by_name.items()}
    draw_curves(drawn, labels, title, folder / "curves.png")
    return found


def _computer(
    config: Config, target: WeightSource, draft: WeightSource | None
) -> Callable[[], JudgeRowComputer]:
    """Loads the models when their rows are wanted: those that are kept need none."""

    def load() -> JudgeRowComputer:
        threads = config.target.num_threads * config.target.tp_size
        last = (target.config.num_layers,)
        model = TargetFeatures(target, last, torch_dtype(config.target.dtype), threads)
        if draft is None:
            return JudgeRowComputer(model, None)
        drafter = TargetFeatures(draft, (draft.config.num_layers,), torch_dtype(config.draft.dtype), threads)
        return JudgeRowComputer(model, drafter)

    return load


def _digest(texts: Sequence[LabelledText]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps([text.problem, text.tokens, text.labels]).encode())
    return digest.hexdigest()
