"""What a run of `outrider distill` asks for, text by text: always the same tasks with the same ids, in one order."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from outrider.cluster.bench.prompts import Prompt
from outrider.workers.training.texts import WRITTEN

TaskKind = Literal["prompt", "free", "begun", "raw"]
"""Who writes the prompt: a file; the target, from the template on; the target, from a given beginning on; nobody:
the target goes on with a beginning as it stands."""


@dataclass(frozen=True)
class Task:
    """One text to be written.

    Attributes:
        kind: where the prompt is from.
        text: the prompt or its beginning; empty for a free one.
        is_code: as in `Prompt`.
        temperature: of the answer; the target writes its own prompts at temperature 1.
        template: whether the prompt goes through the chat template.
        source: as in `DistilledText`.
    """

    id: str
    kind: TaskKind
    text: str
    is_code: bool
    temperature: float
    template: bool
    source: str

    def seed(self, run_seed: int, what: Literal["prompt", "answer"]) -> int:
        """Of the request: every text has its own noise, the same in every run with this `run_seed`."""
        name = f"{run_seed}/{self.id}/{what}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Plan:
    """All texts of a run.

    Attributes:
        prompts: by name of the file; each is answered once at each temperature and, by `templates`, with the chat
            template, without, or both.
        num_free, num_begun, num_raw: texts of these kinds; their temperatures, and their beginnings, take turns.
    """

    prompts: dict[str, Sequence[Prompt]]
    temperatures: tuple[float, ...]
    templates: tuple[bool, ...]
    num_free: int
    num_begun: int
    beginnings: Sequence[Prompt]
    num_raw: int
    raw_beginnings: Sequence[Prompt]

    @property
    def num_texts(self) -> int:
        return sum(count for count, _ in self._kinds())

    def tasks(self) -> Iterator[Task]:
        """Kinds and files mixed evenly, so that a run that ends early has something of each. Made one by one."""

        def placed(count: int, task: Callable[[int], Task]) -> Iterator[tuple[float, str, Task]]:
            for index in range(count):
                made = task(index)
                yield (index + 0.5) / count, made.id, made

        for _, _, task in heapq.merge(*(placed(count, task) for count, task in self._kinds())):
            yield task

    def _kinds(self) -> list[tuple[int, Callable[[int], Task]]]:
        """How many texts of each kind, and what makes the i-th."""
        num_ways = len(self.temperatures) * len(self.templates)
        kinds: list[tuple[int, Callable[[int], Task]]] = [
            (len(prompts) * num_ways, lambda index, name=name: self._answer(name, index))  # type: ignore[misc]
            for name, prompts in self.prompts.items()
        ]
        kinds.append((self.num_free, lambda index: self._written("free", "", index)))
        for kind, count, lines in (
            ("begun", self.num_begun, self.beginnings),
            ("raw", self.num_raw, self.raw_beginnings),
        ):
            kinds.append(
                (count, lambda i, kind=kind, lines=lines: self._written(kind, lines[i % len(lines)].text, i))  # type: ignore[misc]
            )
        return kinds

    def _answer(self, name: str, index: int) -> Task:
        way, number = divmod(index, len(self.prompts[name]))
        turn, style = divmod(way, len(self.templates))
        temperature, template = self.temperatures[turn], self.templates[style]
        prompt = self.prompts[name][number]
        text_id = f"{name}-{number:06d}-{'chat' if template else 'raw'}-{temperature:g}"
        return Task(text_id, "prompt", prompt.text, prompt.is_code, temperature, template, name)

    def _written(self, kind: TaskKind, beginning: str, index: int) -> Task:
        # Beginnings and temperatures take turns at different paces: every beginning meets every temperature.
        num_lines = max(1, len(self.beginnings if kind == "begun" else self.raw_beginnings))
        turn = index if kind == "free" else index + index // num_lines
        temperature = self.temperatures[turn % len(self.temperatures)]
        return Task(f"{kind}-{index:07d}", kind, beginning, False, temperature, kind != "raw", WRITTEN)
