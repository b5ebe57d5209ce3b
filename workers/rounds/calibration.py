"""Whether draft heads guess what this target says: before anybody is served, each drafts a short text alone.

Heads of another target, or heads that are fed other rows than those they were trained on, cost time and are never
right, and nothing else tells: the text is the target's in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.rounds.budget import CostModel
from outrider.workers.rounds.growth import GrowthOptions
from outrider.workers.rounds.loop import LoopOptions, RoundLoop, TargetLink
from outrider.workers.rounds.scheduler import Scheduler
from outrider.workers.sequences.sequence import DraftOptions, Request, RequestStats, TokenEvent
from outrider.workers.trace import Tracer

_NUM_CHILDREN = 1  # one guess a round: more are right more often by chance
_CHANCE = (
    0.08  # of first guesses: frequent tokens alone are right that often; poor heads 0.2 (1), good ones 0.5
)
_MIN_ROUNDS = 12  # fewer say nothing


def draft_alone(
    request: Request,
    method: str,
    link: TargetLink,
    scheduler: Scheduler,
    drafting: DraftEngine,
    cost: CostModel,
    heard: Callable[[int], None],
) -> RequestStats:
    """Runs a request, one guess of one method a round, while nothing else runs: to its end, or until `warning_of`
    would be silent whatever else came.

    heard: told of the tokens that came out, each time some do.
    """
    events: list[TokenEvent] = []
    trial = replace(request, id=f"calibration of {method}", draft=DraftOptions((method,), _NUM_CHILDREN, 1))

    def emit(event: TokenEvent) -> None:
        events.append(event)
        heard(sum(len(event.tokens) for event in events))
        if event.finish_reason:
            loop.stop()
        elif _num_right(event.stats) >= _CHANCE * request.sampling.max_tokens:
            loop.cancel(trial.id)

    growth = GrowthOptions(
        draft_ahead=False,
        fixed_budget=True,
        draft_costs=True,
        max_round_tokens=scheduler.limits.max_round_tokens,
    )
    options = LoopOptions(False, 1, False, growth, heartbeat_s=1.0)
    loop = RoundLoop(link, scheduler, drafting, cost, options, Tracer("draft", False), emit)
    loop.submit(trial)
    loop.run_serial()
    return events[-1].stats


def warning_of(method: str, checkpoint: str, stats: RequestStats) -> str:
    """What there is to say about heads that drafted a text alone; empty: nothing."""
    num_offered, num_accepted = sum(stats.depth_drafted[:1]), _num_right(stats)
    if num_offered < _MIN_ROUNDS or num_accepted >= _CHANCE * num_offered:
        return ""
    return (
        f"draft.{method}.model ({checkpoint}) guesses no better than chance: of {num_offered} first guesses in a "
        f"short text {num_accepted} were right. Was it made for another target, or another fine-tuning of it? Does "
        "it read other layers of the target (taps) than it was trained on? Was it trained with another chat "
        "template, or none?"
    )


def _num_right(stats: RequestStats) -> int:
    """First guesses that were."""
    return sum(stats.depth_accepted[:1])
