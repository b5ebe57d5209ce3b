"""Texts by a running engine: many requests in flight, each text judged and written as soon as it is there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from outrider.cluster.api import GenerationRequest
from outrider.cluster.bench.prompts import Prompt, encode
from outrider.cluster.distillation.plan import Task
from outrider.cluster.distillation.template import UserTurn
from outrider.cluster.in_flight import in_flight
from outrider.workers.answer import Completion
from outrider.workers.training.filters import NearDuplicates, degeneration
from outrider.workers.training.lines import read_dropped
from outrider.workers.training.texts import DistilledText, TextWriter, read_texts


class CompletingEngine(Protocol):
    """What of an `Engine` is used."""

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]: ...


@dataclass(frozen=True)
class Dropped:
    """A task of which nothing came that is worth keeping, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Answerer:
    """From tasks to texts; its methods may be called from many threads at once.

    Attributes:
        tokenizer: of the target.
        turn: what stands around a user's message; needed for prompts that the target writes.
        seed: of the run.
        max_tokens, max_prompt_tokens: longest answer, and longest prompt that the target writes.
        draft: as in `GenerationRequest`.
        with_text: keep the decoded answers, too.
    """

    engine: CompletingEngine
    tokenizer: Any
    turn: UserTurn | None
    seed: int
    max_tokens: int
    max_prompt_tokens: int
    draft: Mapping[str, object]
    with_text: bool

    def answer(self, task: Task) -> DistilledText | Dropped:
        """One text, in one request or (where the target writes the prompt) two. Raises EngineError."""
        prompt: Prompt | Dropped = Prompt(task.id, task.source, task.text, task.is_code)
        if task.kind in ("free", "begun"):
            prompt = self._written_prompt(task)
        if isinstance(prompt, Dropped):
            return prompt
        prompt_tokens = encode(prompt, self.tokenizer, "chat" if task.template else "raw")
        sampling = {"temperature": task.temperature, "max_tokens": self.max_tokens}
        completion = self._ask(prompt_tokens, sampling, task.seed(self.seed, "answer"))
        if completion.error:
            return Dropped(task.id, f"refused: {completion.error}")
        return DistilledText(
            id=task.id,
            prompt_tokens=prompt_tokens,
            output_tokens=completion.tokens,
            temperature=task.temperature,
            template=task.template,
            source=task.source,
            finish_reason=completion.finish_reason,
            text=completion.text if self.with_text else "",
        )

    def _written_prompt(self, task: Task) -> Prompt | Dropped:
        """A user's message that the target wrote, at temperature 1, until it ended the turn."""
        assert self.turn is not None
        opening = self.tokenizer.encode(self.turn.before + task.text, add_special_tokens=False)
        sampling: dict[str, object] = {"temperature": 1.0, "max_tokens": self.max_prompt_tokens}
        if self.turn.end_token >= 0:
            sampling["stop_token_ids"] = [self.turn.end_token]
        elif self.turn.end_text:
            sampling["stop"] = [self.turn.end_text]
        completion = self._ask(tuple(opening), sampling, task.seed(self.seed, "prompt"))
        if completion.error:
            return Dropped(task.id, f"refused: {completion.error}")
        if completion.finish_reason != "stop":
            return Dropped(task.id, "prompt without an end")
        if not completion.text.strip():
            return Dropped(task.id, "empty prompt")
        # The last one ended the turn. Others stand for what no user can write.
        if not set(self.tokenizer.all_special_ids).isdisjoint(completion.tokens[:-1]):
            return Dropped(task.id, "special tokens in the prompt")
        if degeneration(completion.tokens):
            return Dropped(task.id, "prompt that repeats itself")
        return Prompt(task.id, task.source, (task.text + completion.text).strip())

    def _ask(self, prompt: tuple[int, ...], sampling: Mapping[str, object], seed: int) -> Completion:
        (completion,) = self.engine.completions(
            [GenerationRequest(prompt, {**sampling, "seed": seed}, self.draft)]
        )
        return completion


@dataclass
class Tally:
    """How far a run is, what stood there before included.

    Attributes:
        num_planned: texts, dropped ones included; max_tokens: output tokens at which it ends, 0 for all texts.
        num_texts, num_tokens: kept, and their output tokens; num_dropped: by reason.
        num_generated: output tokens of this process, those of dropped texts included.
    """

    num_planned: int
    max_tokens: int
    num_texts: int = 0
    num_tokens: int = 0
    num_dropped: Counter[str] = field(default_factory=Counter)
    num_generated: int = 0
    began: float = field(default_factory=time.monotonic)
    fraction_before: float = 0.0

    @property
    def fraction(self) -> float:
        """Of the run that is done."""
        fraction = (self.num_texts + self.num_dropped.total()) / max(1, self.num_planned)
        if self.max_tokens:
            fraction = max(fraction, self.num_tokens / self.max_tokens)
        return min(1.0, fraction)

    @property
    def tokens_per_s(self) -> float:
        return self.num_generated / max(1e-9, time.monotonic() - self.began)

    @property
    def remaining_s(self) -> float:
        """Estimated, at the pace of this process; infinite until something is done."""
        done = self.fraction - self.fraction_before
        return (time.monotonic() - self.began) * (1.0 - self.fraction) / done if done > 0 else float("inf")

    def restart(self) -> None:
        """Pace and estimate count from here."""
        self.began, self.fraction_before = time.monotonic(), self.fraction

    def note(self, outcome: DistilledText | Dropped) -> None:
        if isinstance(outcome, Dropped):
            self.num_dropped[outcome.reason.split(":")[0]] += 1
        else:
            self.num_texts += 1
            self.num_tokens += len(outcome.output_tokens)


class Judge:
    """Which texts are kept: no loops, and nothing that is nearly there already."""

    def __init__(self, similarity: float) -> None:
        self._known = NearDuplicates(similarity)

    def remember(self, text: DistilledText) -> None:
        """A text that is kept in any case."""
        self._known.add(text.id, text.output_tokens)

    def verdict(self, text: DistilledText) -> DistilledText | Dropped:
        if degeneration(text.output_tokens):
            return Dropped(text.id, "repeats itself")
        # Prompts are left out: all that went through a template have much in common.
        similar = self._known.add(text.id, text.output_tokens)
        return Dropped(text.id, f"near-duplicate: of {similar}") if similar else text


def recall(directory: Path, judge: Judge, tally: Tally) -> set[str]:
    """Ids of the tasks that earlier runs are done with; judge and tally get to know what these made."""
    done = set()
    for text in read_texts(directory):
        done.add(text.id)
        judge.remember(text)
        tally.note(text)
    for text_id, reason in read_dropped(directory).items():
        done.add(text_id)
        tally.note(Dropped(text_id, reason))
    return done


def distill(
    tasks: Iterable[Task],
    answer: Callable[[Task], DistilledText | Dropped],
    writer: TextWriter,
    judge: Judge,
    tally: Tally,
    concurrency: int,
    on_text: Callable[[], None],
) -> None:
    """Works through the tasks, `concurrency` at a time, until they or the wanted tokens are done.

    Leaving early (Ctrl-C, a dead engine) keeps every text that was written; requests in flight are given up, and
    their threads end when the engine is closed.
    """

    def wanted() -> Iterator[Task]:
        for task in tasks:
            if tally.max_tokens and tally.num_tokens >= tally.max_tokens:
                return
            yield task

    for outcome in in_flight(wanted(), answer, concurrency):
        if isinstance(outcome, DistilledText):
            tally.num_generated += len(outcome.output_tokens)
            outcome = judge.verdict(outcome)
        if isinstance(outcome, DistilledText):
            writer.write(outcome)
        else:
            writer.drop(outcome.id, outcome.reason)
        tally.note(outcome)
        on_text()
