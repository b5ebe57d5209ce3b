"""Labels without people: which of a drafter's words may stand, found by trying them (AutoJudge, arXiv 2504.20039).

The target answers a task, greedily. Where the draft model, reading the same text, would say another token, that token
is put in and the target goes on from there; if the answer comes to the same, the mismatch was harmless, and mining
goes on in the text with it; else in the text without. So harmless tokens are seen behind others that were kept, as a
judge will see them.

The draft model's likeliest token after a text is the first candidate that a greedy tree offers there. It is computed
by the draft model alone in this process, over whole texts at once: the round loop stays as it is, and no mismatch is
missed because a tree happened to end before it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from outrider.cluster.api import GenerationRequest
from outrider.cluster.in_flight import in_flight
from outrider.workers.answer import Completion
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.judges.labels import (
    BAD,
    GOOD,
    MINED,
    READ,
    UNUSED,
    LabelledText,
    LabelWriter,
    iter_labels,
    prompt_of,
)
from outrider.workers.training.judges.tasks import Coding, Task
from outrider.workers.training.lines import read_dropped

_ROWS = 256


class CompletingEngine(Protocol):
    """What of an `Engine` is used."""

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]: ...


class Chooser(Protocol):
    """What a drafter would say."""

    def choices(self, prompt: Sequence[int], output: Sequence[int]) -> Sequence[int]:
        """Its likeliest token in the place of each of the output's."""
        ...


class DraftModelChooser:
    """The draft model in this process. May be called from many threads; one reads at a time."""

    def __init__(self, model: TargetFeatures, vocab_size: int) -> None:
        """`model` gives the rows that leave its last layer; vocab_size: of the target, whose tokens count."""
        self._model = model
        self._vocab_size = vocab_size
        self._lock = threading.Lock()

    def choices(self, prompt: Sequence[int], output: Sequence[int]) -> Sequence[int]:
        model = self._model.model
        with self._lock:
            (rows,) = self._model.rows([[*prompt, *output]])
            before = rows[model.config.num_layers][len(prompt) - 1 : -1]
            found = [
                model.logits(before[start : start + _ROWS])[:, : self._vocab_size].argmax(-1).tolist()
                for start in range(0, len(before), _ROWS)
            ]
        return [token for part in found for token in part]


@dataclass(frozen=True)
class Miner:
    """From tasks to labels; `mine` may be called from many threads at once.

    Attributes:
        tokenizer: of the target.
        end_tokens: that end a text.
        max_tokens: of an answer.
        max_mismatches: of a task.
    """

    engine: CompletingEngine
    chooser: Chooser
    tokenizer: Any
    end_tokens: frozenset[int]
    max_tokens: int
    max_mismatches: int

    def mine(self, task: Task, note: Callable[[LabelledText], None]) -> str:
        """All mismatches of one task, one after the other. Raises EngineError.

        Args:
            note: gets each labelled text when it is known, the text that was read last.

        Returns why the task has none; empty where it has.
        """
        prompt = prompt_of(task.messages, self.tokenizer)
        first = self._ask(prompt, self.max_tokens)
        if first.error:
            return f"refused: {first.error}"
        if first.finish_reason != "stop":
            return "answer without an end"
        wanted = self._outcome(task, first.tokens)
        if not wanted or (isinstance(task, Coding) and not task.is_right(wanted)):
            # What is wrong anyhow, any change of leaves wrong.
            return "answer without a result"
        current, begin = tuple(first.tokens), 0
        choices = self.chooser.choices(prompt, current)
        for number in range(self.max_mismatches):
            place = _next_mismatch(current, choices, begin)
            if place == len(current):
                begin = place
                break
            swapped = (*current[:place], choices[place])
            whole = self._finished(prompt, swapped)
            is_harmless = self._outcome(task, whole) == wanted
            labels = UNUSED * place + (GOOD if is_harmless else BAD)
            note(_text(task, str(number), MINED, prompt, swapped, labels))
            begin = place + 1
            if is_harmless:
                current = whole
                choices = self.chooser.choices(prompt, current) if begin < len(current) else ()
        read = current[:begin]
        note(_text(task, "read", READ, prompt, read, GOOD * len(read)))
        return ""

    def _finished(self, prompt: tuple[int, ...], beginning: tuple[int, ...]) -> tuple[int, ...]:
        """The target's text from a beginning on."""
        left = self.max_tokens - len(beginning)
        if beginning[-1] in self.end_tokens or left < 1:
            return beginning
        completion = self._ask((*prompt, *beginning), left)
        # Too long for the context, say: the text is what there is of it.
        return beginning if completion.error else (*beginning, *completion.tokens)

    def _outcome(self, task: Task, tokens: Sequence[int]) -> str:
        return task.outcome(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _ask(self, prompt: tuple[int, ...], max_tokens: int) -> Completion:
        sampling = {"temperature": 0.0, "max_tokens": max_tokens}
        (completion,) = self.engine.completions([GenerationRequest(prompt, sampling)])
        return completion


def _text(
    task: Task, name: str, kind: str, prompt: tuple[int, ...], tokens: tuple[int, ...], labels: str
) -> LabelledText:
    problem = f"{task.domain}/{task.id}"
    return LabelledText(f"{task.id}/{name}", problem, task.domain, kind, prompt, tokens, labels)


def _next_mismatch(current: Sequence[int], choices: Sequence[int], begin: int) -> int:
    """The first place from `begin` on where the two differ; the length of `current` where there is none."""
    differs = np.flatnonzero(np.asarray(current[begin:]) != np.asarray(choices[begin : len(current)]))
    return begin + int(differs[0]) if len(differs) else len(current)


@dataclass
class Yield:
    """How far mining is, what stood there before included.

    Attributes:
        num_tasks: all there are; num_done: with labels; num_dropped: by reason.
        num_harmful, num_harmless: mismatches.
    """

    num_tasks: int
    num_done: int = 0
    num_harmful: int = 0
    num_harmless: int = 0
    num_dropped: Counter[str] = field(default_factory=Counter)

    @property
    def fraction(self) -> float:
        return (self.num_done + self.num_dropped.total()) / max(1, self.num_tasks)

    def note(self, text: LabelledText) -> None:
        if text.kind == READ:
            self.num_done += 1
        else:
            self.num_harmful += BAD in text.labels
            self.num_harmless += GOOD in text.labels

    def summary(self) -> str:
        """In one line."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.num_dropped.most_common())
        return (
            f"{self.num_done} of {self.num_tasks} tasks, {self.num_harmful} harmful and {self.num_harmless} harmless "
            f"mismatches" + (f"; dropped: {dropped}" if dropped else "")
        )


def recall(directory: Path, found: Yield) -> set[str]:
    """Ids of the tasks that earlier runs are done with; the tally gets to know them."""
    by_task: dict[str, list[LabelledText]] = {}
    for text in iter_labels(directory):
        by_task.setdefault(text.id.rpartition("/")[0], []).append(text)
    done = set()
    for task, texts in by_task.items():
        # A task whose last text is missing was cut off: it is mined again, and texts that stand there twice are one.
        if texts[-1].kind == READ:
            done.add(task)
            for text in {text.id: text for text in texts}.values():
                found.note(text)
    for task, reason in read_dropped(directory).items():
        done.add(task)
        found.num_dropped[reason.split(":")[0]] += 1
    return done


def mine(
    tasks: Iterable[Task],
    work: Callable[[Task, Callable[[LabelledText], None]], str],
    writer: LabelWriter,
    found: Yield,
    concurrency: int,
    on_task: Callable[[], None],
) -> None:
    """Works through the tasks, `concurrency` at a time. Leaving early keeps what is known by then.

    Args:
        work: `Miner.mine`.
        on_task: called after each.
    """
    lock = threading.Lock()

    def note(text: LabelledText) -> None:
        with lock:
            writer.write(text)
            found.note(text)

    def outcome(task: Task) -> tuple[Task, str]:
        return task, work(task, note)

    for task, reason in in_flight(tasks, outcome, concurrency):
        if reason:
            with lock:
                writer.drop(task.id, reason)
                found.num_dropped[reason.split(":")[0]] += 1
        on_task()
