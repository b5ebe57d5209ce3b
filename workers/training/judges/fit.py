"""Fitting a judge: logistic regression on standardised rows, calibrated on problems that it was not fitted to.

Judge Decoding (arXiv 2501.19309) weights its cross-entropy by class, for mistakes are rare; AutoJudge (arXiv
2504.20039) fits scikit-learn's logistic regression and takes the threshold that refuses nine in ten harmful tokens.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from outrider.workers.judging.head import JudgeHead
from outrider.workers.training.judges.rows import Bools, Floats, JudgeRows

Learned = Literal["all", "mismatches"]
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""scikit-learn's C, tried in this order: the inverse strength of the L2 penalty on standardised weights."""

_MAX_STEPS = 500
_WORDS = {"train": "fit", "calibrate": "calibrate", "held_out": "measure"}


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled tokens by what they are for. No problem is in two of them."""

    train: JudgeRows
    calibrate: JudgeRows
    held_out: JudgeRows

    def check(self) -> None:
        """Raises ValueError where a part has no harmful token or no harmless one that a judge is asked about."""
        for name, word in _WORDS.items():
            rows: JudgeRows = getattr(self, name)
            asked = rows.at(rows.is_mismatch)
            num_good = int(asked.is_good.sum())
            if not 0 < num_good < len(asked):
                raise ValueError(
                    f"--labels must hold harmful and harmless mismatches to {word} a judge with, got "
                    f"{len(asked) - num_good} and {num_good} of {len(set(rows.problems))} problems"
                )


def split_by_problem(rows: JudgeRows, seed: int) -> Split:
    """Three of five problems of each domain to fit to, one to calibrate on, one to measure on."""
    part_of: dict[str, int] = {}
    for domain in dict.fromkeys(rows.domains.tolist()):
        problems = sorted(set(rows.problems[rows.domains == domain].tolist()))
        problems.sort(key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
        parts = (0, 1, 0, 2, 0)
        part_of |= {problem: parts[place % 5] for place, problem in enumerate(problems)}
    parts_of = np.array([part_of[problem] for problem in rows.problems.tolist()])
    return Split(*(rows.at(parts_of == part) for part in range(3)))


@dataclass(frozen=True)
class Fitted:
    """A judge and how it came about.

    Attributes:
        head: reads rows as they are; its score is the probability of a good token among mismatches.
        penalty: scikit-learn's C.
        auc: area under the ROC curve on the calibration problems, by which the penalty was chosen.
        num_learned: tokens that it was fitted to; num_bad: of these mistaken ones.
        scale, shift: of the calibration (Platt): logits times the one plus the other.
    """

    head: JudgeHead
    penalty: float
    auc: float
    num_learned: int
    num_bad: int
    scale: float
    shift: float


def fit_judge(split: Split, learned: Learned, seed: int, threads: int) -> Fitted:
    """Fits, chooses the penalty and calibrates.

    Args:
        learned: whether every labelled token is learned, as in Judge Decoding, or mismatches alone, as in AutoJudge.

    Raises:
        ValueError: there is too little to learn from, or nothing was learned.
    """
    split.check()
    train = split.train if learned == "all" else split.train.at(split.train.is_mismatch)
    asked = split.calibrate.at(split.calibrate.is_mismatch)
    mean = train.rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Columns that never change say nothing; dividing by nearly nothing would make noise of them.
    deviation = train.rows.std(axis=0, dtype=np.float64).astype(np.float32)
    deviation = np.where(deviation > 1e-6 * np.abs(mean).max(initial=1e-6), deviation, np.float32(1.0))
    standard = (train.rows - mean) / deviation
    best: tuple[float, float, Floats, float] | None = None
    with threadpool_limits(threads):
        for penalty in PENALTIES:
            model = LogisticRegression(
                C=penalty, class_weight="balanced", max_iter=_MAX_STEPS, random_state=seed
            )
            model.fit(standard, train.is_good)
            weight, bias = model.coef_[0].astype(np.float32), float(model.intercept_[0])
            area = float(
                roc_auc_score(asked.is_good, ((asked.rows - mean) / deviation) @ weight + np.float32(bias))
            )
            if best is None or area > best[0]:
                best = (area, penalty, weight, bias)
    assert best is not None
    area, penalty, weight, bias = best
    if area <= 0.5:
        raise ValueError(f"--labels: nothing was learned from them: AUC {area:.3f} on problems not fitted to")
    logits = ((asked.rows - mean) / deviation) @ weight + np.float32(bias)
    scale, shift = platt(logits, asked.is_good)
    head = JudgeHead.folded(
        torch.from_numpy(weight * np.float32(scale)),
        bias * scale + shift,
        torch.from_numpy(mean),
        torch.from_numpy(deviation.astype(np.float32)),
    )
    return Fitted(head, penalty, area, len(train), int((~train.is_good).sum()), scale, shift)


def platt(logits: Floats, is_good: Bools) -> tuple[float, float]:
    """Scale above 0 and shift that make logits the log-odds of being good (Platt 1999, with his softened targets)."""
    num_good = int(is_good.sum())
    num_bad = len(is_good) - num_good
    high, low = (num_good + 1) / (num_good + 2), 1 / (num_bad + 2)
    # Softened targets as weights: each example counts as good by its target and as bad by the rest.
    target = np.where(is_good, high, low)
    twice = np.concatenate([logits, logits])[:, None].astype(np.float64)
    spread = float(twice.std()) or 1.0
    model = LogisticRegression(C=1e6, max_iter=_MAX_STEPS)
    model.fit(
        twice / spread,
        np.concatenate([np.ones(len(logits), dtype=bool), np.zeros(len(logits), dtype=bool)]),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    return max(float(model.coef_[0, 0]) / spread, 1e-6), float(model.intercept_[0])


def scores(head: JudgeHead, rows: Floats) -> Floats:
    """The judge's, float32 [N]."""
    with torch.inference_mode():
        found: npt.NDArray[np.float32] = head(torch.from_numpy(rows)).sigmoid().numpy()
    return found


def threshold_for(scored: Floats, is_good: Bools, recall: float) -> float:
    """The lowest threshold, in thousandths, above which at most 1 - `recall` of the harmful tokens score."""
    harmful = np.sort(scored[~is_good])
    num_refused = math.ceil(recall * len(harmful))
    return math.ceil(1000 * float(harmful[num_refused - 1])) / 1000 if num_refused else 0.0
