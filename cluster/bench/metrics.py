"""From runs to figures: throughput, latency, acceptance, busy shares, agreement between modes.

acceptance_rate = accepted / drafted tokens; acceptance_length = tokens per target step, its own included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from outrider.cluster.bench.runner import Run, Turn

MODEL_KINDS = frozenset({"forward"})
"""Spans in which a model computes. `wait` is idle; all others are what a round costs besides the models."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one figure over the runs (NaN where there is nothing to measure)."""

    median: float
    lower_quartile: float
    upper_quartile: float
    num_values: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        kept = np.array([value for value in values if np.isfinite(value)])
        if kept.size == 0:
            return Spread(float("nan"), float("nan"), float("nan"), 0)
        lower, median, upper = np.percentile(kept, [25, 50, 75])
        return Spread(float(median), float(lower), float(upper), int(kept.size))


@dataclass(frozen=True)
class ModeSummary:
    """One mode at one concurrency."""

    mode: str
    concurrency: int
    num_runs: int
    num_tokens: int
    tokens_per_s: float
    """All tokens over all the time the mode had the machine, prompts included."""

    tokens_per_s_of_runs: Spread
    """Of single answers, from submission to their last token."""

    ttft_s: Spread
    """Time to the first token."""

    time_per_token_s: Spread
    """Per answer: mean time from one token to the next, after the first."""

    nodes_per_step: float
    """Drafted nodes of a sequence that a step of the target verifies: the tree that pays, which falls with the
    number of streams."""

    acceptance_rate: float
    acceptance_length: float
    acceptance_by_depth: tuple[float, ...]
    """At position d: of the rounds that drafted d + 1 tokens deep below accepted ones, how many accepted."""

    rounds_by_depth: tuple[int, ...]
    """At position d: the number of those rounds."""

    busy_share: dict[str, float]
    """Per worker: fraction of the time that it was not waiting."""

    time_share: dict[str, dict[str, float]]
    """Per worker and kind of span: fraction of the time."""

    tokens_per_s_by_category: dict[str, float]

    @property
    def label(self) -> str:
        return _label(self.mode, self.concurrency)


def summarise(turns: Sequence[Turn]) -> list[ModeSummary]:
    """One summary per mode and concurrency, in the order they first ran."""
    groups: dict[tuple[str, int], list[Turn]] = defaultdict(list)
    for turn in turns:
        groups[turn.mode, turn.concurrency].append(turn)
    return [_summary(mode, concurrency, group) for (mode, concurrency), group in groups.items()]


def non_model_share(summary: ModeSummary, workers: Sequence[str]) -> dict[str, float]:
    """Per kind of span that is neither a model nor waiting: its share of the time, added over `workers`.

    An upper bound for what it adds to a round, because workers overlap.
    """
    shares: dict[str, float] = defaultdict(float)
    for worker in workers:
        for kind, share in summary.time_share.get(worker, {}).items():
            if kind not in MODEL_KINDS and kind != "wait":
                shares[kind] += share
    return dict(shares)


@dataclass(frozen=True)
class Agreement:
    """Whether two modes gave the same tokens, prompt by prompt (first repeat)."""

    one: str
    other: str
    num_prompts: int
    num_equal: int
    first_differences: dict[str, int]
    """Prompt id -> index of the first token that differs (or is missing in one)."""


def agreements(turns: Sequence[Turn], stop_token_ids: Iterable[int]) -> list[Agreement]:
    """For every pair of modes. Engines differ in whether they return the stop token, so it does not count."""
    stops = frozenset(stop_token_ids)
    texts: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for turn in turns:
        label = _label(turn.mode, turn.concurrency)
        for run in turn.runs:
            tokens = run.answer.tokens
            texts[label].setdefault(run.prompt_id, tokens[:-1] if tokens and tokens[-1] in stops else tokens)
    found = []
    for one, other in combinations(texts, 2):
        common = [prompt_id for prompt_id in texts[one] if prompt_id in texts[other]]
        differences = {
            prompt_id: first_difference(texts[one][prompt_id], texts[other][prompt_id])
            for prompt_id in common
            if texts[one][prompt_id] != texts[other][prompt_id]
        }
        found.append(Agreement(one, other, len(common), len(common) - len(differences), differences))
    return found


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Index of the first place where the two differ, the shorter one's length if it begins the other."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _label(mode: str, concurrency: int) -> str:
    return mode if concurrency == 1 else f"{mode} x{concurrency}"


def _summary(mode: str, concurrency: int, turns: Sequence[Turn]) -> ModeSummary:
    runs = [run for turn in turns for run in turn.runs]
    wall_s = sum(turn.wall_s for turn in turns)
    num_tokens = sum(turn.num_tokens for turn in turns)
    num_drafted = sum(run.answer.stats.num_drafted for run in runs)
    num_steps = sum(run.answer.stats.num_rounds for run in runs)
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for turn in turns:
        for worker, kinds in turn.busy_s.items():
            for kind, value in kinds.items():
                seconds[worker][kind] += value
    num_depths = max((len(run.answer.stats.depth_drafted) for run in runs), default=0)
    rounds_by_depth = _add_by_depth((run.answer.stats.depth_drafted for run in runs), num_depths)
    accepted_by_depth = _add_by_depth((run.answer.stats.depth_accepted for run in runs), num_depths)
    time_share = {worker: _time_share(kinds, wall_s) for worker, kinds in seconds.items()}
    return ModeSummary(
        mode=mode,
        concurrency=concurrency,
        num_runs=len(runs),
        num_tokens=num_tokens,
        tokens_per_s=_ratio(num_tokens, wall_s),
        tokens_per_s_of_runs=Spread.of(_ratio(len(run.answer.tokens), run.answer.total_s) for run in runs),
        ttft_s=Spread.of(run.answer.token_times_s[0] for run in runs if run.answer.tokens),
        time_per_token_s=Spread.of(_time_per_token(run) for run in runs),
        nodes_per_step=_ratio(num_drafted, num_steps),
        acceptance_rate=_ratio(sum(run.answer.stats.num_accepted for run in runs), num_drafted),
        acceptance_length=_ratio(num_tokens, num_steps),
        acceptance_by_depth=tuple(
            _ratio(a, d) for a, d in zip(accepted_by_depth, rounds_by_depth, strict=True)
        ),
        rounds_by_depth=tuple(rounds_by_depth),
        busy_share={worker: 1 - shares["wait"] for worker, shares in time_share.items()},
        time_share=time_share,
        tokens_per_s_by_category=_by_category(runs),
    )


def _time_share(seconds: Mapping[str, float], wall_s: float) -> dict[str, float]:
    """Waiting is what is left: a worker's own count of it includes the turns of other modes."""
    shares = {kind: value / wall_s for kind, value in seconds.items() if kind != "wait" and value > 0}
    return {**shares, "wait": max(0.0, 1 - sum(shares.values()))}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _time_per_token(run: Run) -> float:
    times = run.answer.token_times_s
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else float("nan")


def _add_by_depth(counts: Iterable[tuple[int, ...]], num_depths: int) -> list[int]:
    total = [0] * num_depths
    for values in counts:
        for depth, value in enumerate(values):
            total[depth] += value
    return total


def _by_category(runs: Sequence[Run]) -> dict[str, float]:
    tokens: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for run in runs:
        tokens[run.category] += len(run.answer.tokens)
        seconds[run.category] += run.answer.total_s
    return {category: _ratio(tokens[category], seconds[category]) for category in tokens}
