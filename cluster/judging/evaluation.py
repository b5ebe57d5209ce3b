"""Rules of acceptance in service: what they gain and what they cost, on tasks that a machine can check."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from outrider.cluster.api import GenerationRequest
from outrider.cluster.judging.statistics import Interval, fraction, mcnemar, paired_difference
from outrider.workers.answer import Completion
from outrider.workers.training.judges.labels import prompt_of
from outrider.workers.training.judges.tasks import Task
from outrider.workers.training.lines import FORMAT, Layout, LineWriter, read_objects

ANSWERS = Layout("eval.json", "answers", "outrider judge eval")


class AnsweringEngine(Protocol):
    """What of an `Engine` is used."""

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]: ...


@dataclass(frozen=True)
class Mode:
    """A rule and how lossy it is.

    Attributes:
        rule: exact, typical or judge.
        name: with its setting, unique.
        setting: the threshold or epsilon, in words; empty for exact.
        acceptance: as in `GenerationRequest`.
        judge: digest of the judge that is asked; empty for other rules.
    """

    rule: str
    name: str
    setting: str
    acceptance: Mapping[str, object]
    judge: str = ""


EXACT = Mode("exact", "exact", "", {})


def modes(
    rules: Sequence[str], thresholds: Sequence[float], epsilons: Sequence[float], judge: str, digest: str
) -> list[Mode]:
    """`exact` first, whether asked for or not: everything is compared with it.

    Of typical acceptance delta is the square root of epsilon, as in Medusa (arXiv 2401.10774).

    Args:
        judge: its name; digest: what tells it from others.
    """
    found = [EXACT]
    if "typical" in rules:
        for epsilon in epsilons:
            delta = math.sqrt(epsilon)
            acceptance = {"rule": "typical", "epsilon": epsilon, "delta": delta}
            found.append(Mode("typical", f"typical {epsilon:g}", f"{epsilon:g}", acceptance))
    if "judge" in rules:
        for threshold in thresholds:
            acceptance = {"rule": "judge", "judge": judge, "threshold": threshold}
            found.append(Mode("judge", f"judge {threshold:g}", f"{threshold:g}", acceptance, digest))
    return found


@dataclass(frozen=True)
class Outcome:
    """One task answered in one mode.

    Attributes:
        task, mode, judge: which; judge as in `Mode`.
        is_right: whether the answer stands the check.
        num_tokens, num_rounds, num_drafted, num_kept: of the answer.
        worst_gap: nats, of kept tokens; see `KeptAccount`.
        wall_s: from the answer before it, or the block's begin, until this one was read: the sum is the block's time.
        text, tokens: the answer itself; finish_reason: how it ended.
        error: why there is no answer; empty where there is.
    """

    task: str
    mode: str
    judge: str
    is_right: bool
    num_tokens: int
    num_rounds: int
    num_drafted: int
    num_kept: int
    worst_gap: float
    wall_s: float
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    error: str = ""

    @property
    def place(self) -> tuple[str, str, str]:
        """What there is one answer for."""
        return self.task, self.mode, self.judge


def read_outcomes(directory: Path) -> list[Outcome]:
    """What earlier runs answered. Raises ValueError naming file and line of what is no answer."""
    found = []
    for path in ANSWERS.files(directory):
        for number, fields in read_objects(path):
            try:
                found.append(Outcome(**fields | {"tokens": tuple(fields["tokens"])}))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no answer of format {FORMAT} ({error})") from error
    return found


def evaluate(
    engine: AnsweringEngine,
    tasks: Sequence[Task],
    asked: Sequence[Mode],
    tokenizer: Any,
    sampling: Mapping[str, object],
    concurrency: int,
    writer: LineWriter,
    done: Sequence[Outcome],
    on_answer: Callable[[], None],
) -> list[Outcome]:
    """All tasks in all modes, which take turns after every `concurrency` tasks; another one begins each time.

    Args:
        done: answers that are there; they are not asked for again.
        on_answer: called after each answer; what was written by then is kept when the run is cut off.
    """
    found = list(done)
    there = {outcome.place for outcome in done}
    for mode, block in _turns(tasks, asked, concurrency):
        missing = [task for task in block if (task.id, mode.name, mode.judge) not in there]
        if not missing:
            continue
        requests = [
            GenerationRequest(prompt_of(task.messages, tokenizer), sampling, acceptance=mode.acceptance)
            for task in missing
        ]
        before = time.perf_counter()
        for task, answer in zip(missing, engine.completions(requests), strict=True):
            now = time.perf_counter()
            outcome = _outcome(task, mode, answer, now - before)
            before = now
            writer.append(asdict(outcome))
            found.append(outcome)
            on_answer()
    return found


def _turns(
    tasks: Sequence[Task], asked: Sequence[Mode], concurrency: int
) -> Iterator[tuple[Mode, Sequence[Task]]]:
    for number, start in enumerate(range(0, len(tasks), concurrency)):
        for offset in range(len(asked)):
            yield asked[(number + offset) % len(asked)], tasks[start : start + concurrency]


def _outcome(task: Task, mode: Mode, answer: Completion, wall_s: float) -> Outcome:
    stats = answer.stats
    return Outcome(
        task=task.id,
        mode=mode.name,
        judge=mode.judge,
        is_right=not answer.error and task.is_right(task.outcome(answer.text)),
        num_tokens=len(answer.tokens),
        num_rounds=stats.num_rounds,
        num_drafted=stats.num_drafted,
        num_kept=stats.num_kept,
        worst_gap=stats.kept.worst_gap,
        wall_s=wall_s,
        text=answer.text,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        error=answer.error,
    )


@dataclass(frozen=True)
class ModeFigures:
    """What a mode came to.

    Attributes:
        mode, rule, setting: as in `Mode`.
        num_tasks: answered.
        accuracy: fraction of right answers.
        difference: of accuracy, to `exact` on the same tasks; mcnemar_p: of there being none.
        acceptance_length: tokens per target step; relative_length: in units of that of `exact`.
        tokens_per_s: prompt reading included; relative_speed: in units of that of `exact`.
        kept_fraction: of all tokens, those that `exact` would have refused; worst_gap: nats.
        num_errors: tasks without an answer, which count as wrong.
    """

    mode: str
    rule: str
    setting: str
    num_tasks: int
    accuracy: Interval
    difference: Interval
    mcnemar_p: float
    acceptance_length: float
    relative_length: float
    tokens_per_s: float
    relative_speed: float
    kept_fraction: float
    worst_gap: float
    num_errors: int


def figures(outcomes: Sequence[Outcome], asked: Sequence[Mode]) -> list[ModeFigures]:
    """Of each mode, over the tasks that all of them answered."""
    by_mode = {mode.name: {o.task: o for o in outcomes if o.mode == mode.name} for mode in asked}
    tasks = [task for task in by_mode[EXACT.name] if all(task in found for found in by_mode.values())]
    assert tasks, "every mode answers every task"
    exact = [by_mode[EXACT.name][task] for task in tasks]
    base = [outcome.is_right for outcome in exact]
    length, speed = _length(exact), _speed(exact)
    found = []
    for mode in asked:
        of_mode = [by_mode[mode.name][task] for task in tasks]
        right = [outcome.is_right for outcome in of_mode]
        found.append(
            ModeFigures(
                mode=mode.name,
                rule=mode.rule,
                setting=mode.setting,
                num_tasks=len(tasks),
                accuracy=fraction(right),
                difference=paired_difference(right, base),
                mcnemar_p=mcnemar(right, base),
                acceptance_length=_length(of_mode),
                relative_length=_length(of_mode) / length if length else 0.0,
                tokens_per_s=_speed(of_mode),
                relative_speed=_speed(of_mode) / speed if speed else 0.0,
                kept_fraction=sum(o.num_kept for o in of_mode) / max(1, sum(o.num_tokens for o in of_mode)),
                worst_gap=max((o.worst_gap for o in of_mode), default=0.0),
                num_errors=sum(bool(o.error) for o in of_mode),
            )
        )
    return found


def _length(outcomes: Sequence[Outcome]) -> float:
    return sum(o.num_tokens for o in outcomes) / max(1, sum(o.num_rounds for o in outcomes))


def _speed(outcomes: Sequence[Outcome]) -> float:
    return sum(o.num_tokens for o in outcomes) / max(1e-9, sum(o.wall_s for o in outcomes))


def markdown(found: Sequence[ModeFigures]) -> str:
    """A table."""
    lines = [
        "| rule | right | 95 % | against exact, paired | acceptance length | tokens/s | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in found:
        right, other = mode.accuracy, mode.difference
        difference = f"{100 * other.value:+.1f} [{100 * other.low:+.1f}, {100 * other.high:+.1f}]"
        if mode.rule == "exact":
            difference = ""
        lines.append(
            f"| {mode.mode} | {100 * right.value:.1f} % of {mode.num_tasks} | {100 * right.low:.1f} to "
            f"{100 * right.high:.1f} | {difference} | {mode.acceptance_length:.2f} ({mode.relative_length:.2f}x) | "
            f"{mode.tokens_per_s:.1f} ({mode.relative_speed:.2f}x) | {100 * mode.kept_fraction:.1f} % |"
        )
    return "\n".join(lines) + "\n"
