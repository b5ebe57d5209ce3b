"""Runs the modes of a benchmark in turns, so that a machine's slow minute hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from outrider.workers.answer import Completion
from outrider.workers.sequences.params import SamplingParams

BusySeconds = Mapping[str, Mapping[str, float]]
"""worker name -> kind of span -> seconds, as `Tracer.totals` counts them."""


class Decoder(Protocol):
    """One mode: something that answers prompts."""

    @property
    def mode(self) -> str: ...

    @property
    def is_concurrent(self) -> bool:
        """Whether `generate` may be called from several threads at once."""

    def generate(self, prompt_tokens: tuple[int, ...], sampling: SamplingParams) -> Completion: ...

    def busy_seconds(self) -> BusySeconds:
        """Since the start, of all workers; empty if the mode does not tell."""


@dataclass(frozen=True)
class EncodedPrompt:
    id: str
    category: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One prompt answered once in one mode."""

    mode: str
    concurrency: int
    repeat: int
    prompt_id: str
    category: str
    answer: Completion


@dataclass(frozen=True)
class Turn:
    """What one mode did between getting and giving back the machine: one prompt, or all of them at once."""

    mode: str
    concurrency: int
    repeat: int
    wall_s: float
    busy_s: BusySeconds
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(run.answer.tokens) for run in self.runs)


@dataclass(frozen=True)
class Plan:
    """The order of turns."""

    concurrencies: tuple[int, ...]
    """Requests in flight. With one, modes take turns after each prompt; with more, after all prompts."""

    repeats: int
    """How often everything is done."""


def run_turns(
    decoders: Sequence[Decoder],
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingParams,
    plan: Plan,
    on_turn: Callable[[Turn], None] = lambda turn: None,
) -> list[Turn]:
    """All turns in the order they ran. Modes that cannot do several requests at once sit out those turns."""
    turns = []
    for decoder, concurrency, repeat, block in schedule(decoders, prompts, plan):
        turn = _take_turn(decoder, concurrency, repeat, block, sampling)
        turns.append(turn)
        on_turn(turn)
    return turns


def count_turns(decoders: Sequence[Decoder], prompts: Sequence[EncodedPrompt], plan: Plan) -> int:
    return sum(1 for _ in schedule(decoders, prompts, plan))


def schedule(
    decoders: Sequence[Decoder], prompts: Sequence[EncodedPrompt], plan: Plan
) -> Iterator[tuple[Decoder, int, int, Sequence[EncodedPrompt]]]:
    """(decoder, concurrency, repeat, prompts) of each turn. The mode that goes first changes every time."""
    for concurrency in plan.concurrencies:
        able = [decoder for decoder in decoders if concurrency == 1 or decoder.is_concurrent]
        blocks = [[prompt] for prompt in prompts] if concurrency == 1 else [list(prompts)]
        first = 0
        for repeat in range(plan.repeats):
            for block in blocks:
                for offset in range(len(able)):
                    yield able[(first + offset) % len(able)], concurrency, repeat, block
                first += 1


def warm_up(
    decoders: Sequence[Decoder], prompts: Sequence[EncodedPrompt], sampling: SamplingParams, num_tokens: int
) -> None:
    """A short answer in every mode: first calls allocate, tune and page in."""
    shortest = min(prompts, key=lambda prompt: len(prompt.tokens))
    for decoder in decoders:
        decoder.generate(shortest.tokens, replace(sampling, max_tokens=num_tokens))


def _take_turn(
    decoder: Decoder, concurrency: int, repeat: int, block: Sequence[EncodedPrompt], sampling: SamplingParams
) -> Turn:
    before = decoder.busy_seconds()
    begin = time.perf_counter()
    if concurrency == 1:
        answers = [decoder.generate(prompt.tokens, sampling) for prompt in block]
    else:
        # As many threads as requests in flight: a finished one makes room for the next prompt.
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda prompt: decoder.generate(prompt.tokens, sampling), block))
    wall_s = time.perf_counter() - begin
    runs = tuple(
        Run(decoder.mode, concurrency, repeat, prompt.id, prompt.category, answer)
        for prompt, answer in zip(block, answers, strict=True)
    )
    return Turn(decoder.mode, concurrency, repeat, wall_s, _difference(before, decoder.busy_seconds()), runs)


def _difference(before: BusySeconds, after: BusySeconds) -> BusySeconds:
    return {
        worker: {kind: seconds - before.get(worker, {}).get(kind, 0.0) for kind, seconds in kinds.items()}
        for worker, kinds in after.items()
    }
