"""What a judge is worth on mismatches that it was not fitted to, beside judges that need no training to speak of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from outrider.workers.judging.head import ThresholdRow
from outrider.workers.training.judges.labels import MINED
from outrider.workers.training.judges.rows import Bools, Floats, JudgeRows

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
TOKEN_CLASSES = ("digits", "operator", "word", "space", "other")

_OPERATORS = frozenset("+-*/=<>%^|&!~×÷")
_NUM_RESAMPLES = 500
_CURVE_POINTS = 200


@dataclass(frozen=True)
class Quality:
    """How well scores tell harmful mismatches from harmless ones.

    Attributes:
        auc: area under the ROC curve; auc_low, auc_high: its 95 % interval (bootstrap over problems).
        precision: average precision of finding harmful tokens by low scores.
    """

    auc: float
    auc_low: float
    auc_high: float
    precision: float


@dataclass(frozen=True)
class Curves:
    """Points of both curves; harmful tokens are what is to be found.

    Attributes:
        false_alarms, recalls: of the ROC curve: fraction of the harmless tokens refused, of the harmful ones.
        pr_recalls, pr_precisions: of the precision-recall curve.
    """

    false_alarms: tuple[float, ...]
    recalls: tuple[float, ...]
    pr_recalls: tuple[float, ...]
    pr_precisions: tuple[float, ...]


def quality(scored: Floats, asked: JudgeRows, seed: int) -> Quality:
    """Of scores, high ones for harmless tokens. Both kinds of tokens are there."""
    generator = np.random.default_rng(seed)
    problems, owner = np.unique(asked.problems, return_inverse=True)
    places = [np.flatnonzero(owner == index) for index in range(len(problems))]
    areas = []
    for _ in range(_NUM_RESAMPLES):
        drawn = generator.integers(0, len(problems), len(problems))
        chosen = np.concatenate([places[index] for index in drawn])
        is_good = asked.is_good[chosen]
        if 0 < is_good.sum() < len(is_good):
            areas.append(_area(scored[chosen], is_good))
    low, high = np.percentile(areas, [2.5, 97.5]) if areas else (0.0, 1.0)
    return Quality(
        auc=_area(scored, asked.is_good),
        auc_low=float(low),
        auc_high=float(high),
        precision=float(average_precision_score(~asked.is_good, -scored)),
    )


def _area(scored: Floats, is_good: Bools) -> float:
    """Under the ROC curve: how often a harmless token scores higher than a harmful one (Mann and Whitney 1947)."""
    num_good = int(is_good.sum())
    num_bad = len(is_good) - num_good
    higher = rankdata(scored)[is_good].sum() - num_good * (num_good + 1) / 2
    return float(higher / (num_good * num_bad))


def curves(scored: Floats, is_good: Bools) -> Curves:
    """Both curves, thinned to some hundred points."""
    false_alarms, recalls, _ = roc_curve(~is_good, -scored)
    precisions, pr_recalls, _ = precision_recall_curve(~is_good, -scored)
    return Curves(_thinned(false_alarms), _thinned(recalls), _thinned(pr_recalls), _thinned(precisions))


def _thinned(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    places = np.unique(np.linspace(0, len(values) - 1, _CURVE_POINTS).astype(int))
    return tuple(values[places].tolist())


def token_class(text: str) -> str:
    """One of TOKEN_CLASSES, by the characters of a token's text."""
    bare = text.strip()
    if not bare:
        return "space"
    if any(character.isdigit() for character in bare):
        return "digits"
    if any(character in _OPERATORS for character in bare):
        return "operator"
    if any(character.isalpha() for character in bare):
        return "word"
    return "other"


def trivial_judges(train: JudgeRows, asked: JudgeRows, text_of: Callable[[int], str]) -> dict[str, Floats]:
    """Scores of `asked` by name, high ones for harmless tokens, by judges that read no hidden row.

    token class: how many mismatches of the class are harmless among those trained on.
    log-prob: of the token, by the target. entropy: of the target's law; its sign is the better one in training.
    typical: how far p(x) is above the bound of typical acceptance (epsilon 0.09, delta 0.3), in nats.
    together: a logistic regression on class, log-prob and entropy.
    """
    classes, asked_classes = _classes(train, text_of), _classes(asked, text_of)
    # One of each kind more: a class that was never seen is neither.
    share = {
        name: (train.is_good[classes == name].sum() + 1) / ((classes == name).sum() + 2)
        for name in TOKEN_CLASSES
    }
    sign = 1.0 if _area(train.entropies, train.is_good) >= 0.5 else -1.0
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
    model.fit(_features(train, classes), train.is_good)
    bound = np.minimum(np.log(0.09), np.log(0.3) - asked.entropies)
    return {
        "token class": np.array([share[name] for name in asked_classes], dtype=np.float32),
        "log-prob": asked.logprobs,
        "entropy": (sign * asked.entropies).astype(np.float32),
        "typical": (asked.logprobs - bound).astype(np.float32),
        "together": model.decision_function(_features(asked, asked_classes)).astype(np.float32),
    }


def _classes(rows: JudgeRows, text_of: Callable[[int], str]) -> npt.NDArray[np.str_]:
    found = {token: token_class(text_of(token)) for token in set(rows.tokens.tolist())}
    return np.array([found[token] for token in rows.tokens.tolist()])


def _features(rows: JudgeRows, classes: npt.NDArray[np.str_]) -> Floats:
    columns = [rows.logprobs, rows.choice_logprobs, rows.entropies]
    columns += [(classes == name).astype(np.float32) for name in TOKEN_CLASSES]
    return np.stack(columns, axis=1)


def threshold_table(
    scored: Floats, asked: JudgeRows, thresholds: Sequence[float], match_rate: float, draft_length: int
) -> tuple[ThresholdRow, ...]:
    """What each threshold does on these mismatches.

    Args:
        match_rate: fraction of draft tokens that are the target's own, from mining; 0: not known, then acceptance
            length and speed are not said. They are of mined mismatches alone, which are as frequent as in service.
        draft_length: of the chain whose acceptance length is expected, if each token is accepted on its own. Then a
            round costs what one of `exact` costs, and the speeds are as the acceptance lengths.
    """
    is_mined = asked.kinds == MINED
    rows = []
    for threshold in thresholds:
        kept = scored > threshold
        length = speed = 0.0
        if match_rate and is_mined.any():
            kept_share = float(kept[is_mined].mean())
            length = chain_length(match_rate + (1 - match_rate) * kept_share, draft_length)
            speed = length / chain_length(match_rate, draft_length)
        rows.append(
            ThresholdRow(
                threshold=threshold,
                harmful_recall=float((~kept[~asked.is_good]).mean()),
                benign_kept=float(kept[asked.is_good].mean()),
                acceptance_length=length,
                speed=speed,
            )
        )
    return tuple(rows)


def chain_length(acceptance: float, draft_length: int) -> float:
    """Expected tokens of a round, the target's own included, where each of a chain's is accepted with this
    probability."""
    return float(sum(acceptance**depth for depth in range(draft_length + 1)))


def by_group(
    scored: Floats, asked: JudgeRows, names: npt.NDArray[np.str_], threshold: float
) -> dict[str, Mapping[str, float]]:
    """Of each group of mismatches (kinds, domains): how many are harmful and how many of these are refused, how many
    are harmless and how many of these are kept."""
    found: dict[str, Mapping[str, float]] = {}
    for name in sorted(set(names.tolist())):
        here = names == name
        good, kept = asked.is_good[here], scored[here] > threshold
        figures: dict[str, float] = {"num_harmful": int((~good).sum()), "num_harmless": int(good.sum())}
        if figures["num_harmful"]:
            figures["harmful_refused"] = float((~kept[~good]).mean())
        if figures["num_harmless"]:
            figures["harmless_kept"] = float(kept[good].mean())
        found[name] = figures
    return found
