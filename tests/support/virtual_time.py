"""The round loop on a clock that only moves when somebody works: overlap can be measured to the microsecond.

Nothing sleeps and nothing runs beside anything else: the drafter's steps move the clock, and a round's scores
are there once the clock has passed the time at which a target that works in parallel would have been done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.rounds import loop as loop_module
from outrider.workers.rounds.budget import CostModel, TargetProfile
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.messages import Draft, Scores
from outrider.workers.rounds.pages import PagePool
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.rounds.sequence import DraftOptions, Request, TokenEvent
from outrider.workers.sampling.params import SamplingParams
from outrider.workers.trace import Tracer
from support.scripted import ScriptedDrafter, ScriptedTarget


class VirtualClock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class VirtualLink:
    """A target of set latency that works while the clock moves, one round after the other."""

    def __init__(self, clock: VirtualClock, verify_s: float) -> None:
        self.num_rounds = 0
        self._clock = clock
        self._verify_s = verify_s
        self._target = ScriptedTarget(verify_s, sleep=lambda seconds: None)
        self._free_at = clock.now_s
        self._under_way: deque[tuple[float, Scores]] = deque()

    def send(self, draft: Draft) -> None:
        if draft.stop:
            return
        self.num_rounds += 1
        self._free_at = max(self._clock.now_s, self._free_at) + self._verify_s
        self._under_way.append((self._free_at, self._target.step(draft)))

    def receive(self) -> Scores:
        done_at, scores = self._under_way.popleft()
        self._clock.now_s = max(self._clock.now_s, done_at)
        return scores

    def poll(self) -> bool:
        return bool(self._under_way) and self._under_way[0][0] <= self._clock.now_s


@dataclass(frozen=True)
class VirtualRun:
    """What `run_virtual` saw."""

    seconds: float
    num_rounds: int
    texts: dict[str, list[int]]


def run_virtual(
    *,
    verify_s: float,
    step_s: float,
    depth: int,
    options: LoopOptions,
    num_sequences: int,
    num_tokens: int,
    is_right: Callable[[int], bool],
) -> VirtualRun:
    """Texts of `num_tokens` tokens, and the virtual seconds they take. As `support.scripted.run_scripted`."""
    clock = VirtualClock()
    link = VirtualLink(clock, verify_s)
    drafting = DraftEngine(NgramConfig())
    drafting.add(ScriptedDrafter(step_s, is_right, drafting.estimator, clock.sleep))
    cost = CostModel(TargetProfile((1,), (verify_s,)))
    cost.observe_draft_step(step_s)
    texts: dict[str, list[int]] = {str(i): [] for i in range(num_sequences)}
    unfinished = set(texts)

    def emit(event: TokenEvent) -> None:
        texts[event.request_id] += event.tokens
        if event.finish_reason:
            unfinished.discard(event.request_id)
        if not unfinished:
            loop.stop()

    scheduler = Scheduler(SchedulerLimits(8, 256, 64), PagePool(256, 16, False))
    loop = RoundLoop(link, scheduler, drafting, cost, options, Tracer("draft", False), emit)
    for request_id in texts:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        loop.submit(Request(request_id, (1, 2, 3), sampling, DraftOptions(("model",), depth, depth)))
    begun = clock.now_s
    with patch.object(loop_module, "time", clock):
        loop.run()
    return VirtualRun(clock.now_s - begun, link.num_rounds, texts)
