"""Rounds of a scheduler without any model: what the loop does with planned steps, and what scores do."""

from __future__ import annotations

from collections.abc import Callable

from outrider.workers.rounds.scheduler import PlannedStep, Scheduler, SchedulerLimits, whole_prefix
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence

PAGE = 4


def scheduler_with(
    num_pages: int = 100,
    max_sequences: int = 8,
    max_round_tokens: int = 32,
    prefill_chunk: int = 8,
    prefix_sharing: bool = False,
    prefix_kept: Callable[[Sequence], int] = whole_prefix,
    window: int = 0,
) -> Scheduler:
    limits = SchedulerLimits(max_sequences, max_round_tokens, prefill_chunk, window)
    return Scheduler(limits, PagePool(num_pages, PAGE, prefix_sharing), prefix_kept)


def request(request_id: str, prompt_length: int, max_tokens: int = 100, first_token: int = 1) -> Request:
    prompt = tuple(range(first_token, first_token + prompt_length))
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens), DraftOptions((), 4, 4))


def send(scheduler: Scheduler, steps: list[PlannedStep]) -> None:
    """What the loop does with planned steps."""
    for step in steps:
        step.sequence.started = True
        step.sequence.in_flight = True
        step.sequence.num_pages_sent = len(step.sequence.pages)
        step.sequence.pending_accepted = ()
        scheduler.commit_sent(step.sequence)


def settle(steps: list[PlannedStep], num_emitted: int = 1) -> None:
    """The scores of planned steps: chunks are committed; sequences at their end emit tokens."""
    for step in steps:
        sequence = step.sequence
        sequence.in_flight = False
        if step.reaches_end:
            sequence.num_committed += step.chain_length + num_emitted - 1
            sequence.tokens += [7] * num_emitted
        else:
            sequence.num_committed += step.chain_length
