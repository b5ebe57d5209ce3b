"""The round loop on a clock that only moves when somebody works: overlap can be measured to the microsecond.

Nothing sleeps and nothing runs beside anything else: the drafter's steps move the clock, and a round's scores
are there once the clock has passed the time at which a target that works in parallel would have been done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.messages import Draft, Scores
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.scheduler import SchedulerLimits
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, TokenEvent
from support.local_engine import output_tokens
from support.scripted import ScriptedMethod, ScriptedTarget, scripted_loop

_VERIFY_40_MS = PassProfile((1,), (0.04,))
_LIMITS = SchedulerLimits(max_sequences=8, max_round_tokens=256, prefill_chunk=64)


class VirtualClock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class VirtualLink:
    """A target of set latencies that works while the clock moves, one round after the other."""

    def __init__(self, clock: VirtualClock, latencies: PassProfile) -> None:
        self.drafts: list[Draft] = []  # all that was sent
        self._clock = clock
        self._latencies = latencies
        self._target = ScriptedTarget(0.0, sleep=lambda seconds: None)
        self._free_at = clock.now_s
        self._under_way: deque[tuple[float, Scores]] = deque()

    def send(self, draft: Draft) -> None:
        self.drafts.append(draft)
        if not draft.stop:
            seconds = self._latencies.at(draft.steps.num_rows)
            self._free_at = max(self._clock.now_s, self._free_at) + seconds
            scores = self._target.step(draft)._replace(forward_s=seconds)
            self._under_way.append((self._free_at, scores))

    def receive(self) -> Scores:
        done_at, scores = self._under_way.popleft()
        self._clock.now_s = max(self._clock.now_s, done_at)
        return scores

    def poll(self) -> bool:
        return bool(self._under_way) and self._under_way[0][0] <= self._clock.now_s


@dataclass(frozen=True)
class VirtualRun:
    """What `run_requests` saw."""

    seconds: float
    drafts: list[Draft]  # what the target was sent, without the message that stops it
    events: dict[str, list[TokenEvent]]
    num_available_pages: int  # at the end
    prompts_read: set[str]  # ids of requests whose prompts the drafter was asked to read

    @property
    def texts(self) -> dict[str, list[int]]:
        return {request_id: output_tokens(events) for request_id, events in self.events.items()}


def run_requests(
    requests: SequenceABC[Request],
    *,
    options: LoopOptions,
    latencies: PassProfile = _VERIFY_40_MS,
    step_s: float = 0.01,
    assumed_step_s: float | None = None,
    must_read: bool = False,
    is_right: Callable[[int], bool] = lambda position: True,
    limits: SchedulerLimits = _LIMITS,
    num_pages: int = 256,
    on_event: Callable[[RoundLoop, TokenEvent], None] = lambda loop, event: None,
) -> VirtualRun:
    """Run requests to their ends with scripted workers; pages hold 16 rows. `on_event` may use the loop.

    `latencies` is what a pass of the target takes, and what the loop knows of it; `assumed_step_s` is what it takes
    for the seconds of a drafter step, if not `step_s`. `must_read`: see `ScriptedMethod`.
    """
    clock = VirtualClock()
    link = VirtualLink(clock, latencies)
    cost = CostModel(latencies, {ScriptedMethod.name: PassProfile((1,), (assumed_step_s or step_s,))})
    drafters: list[ScriptedMethod] = []
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    unfinished = set(events)

    def emit(event: TokenEvent) -> None:
        events[event.request_id].append(event)
        if event.finish_reason:
            unfinished.remove(event.request_id)
        on_event(loop, event)
        if not unfinished:
            loop.stop()

    pool = PagePool(num_pages, 16, prefix_sharing=False)

    def methods(slots: DraftedSlots, estimator: AcceptanceEstimator) -> list[ScriptedMethod]:
        drafters.append(ScriptedMethod(slots, estimator, step_s, is_right, clock.sleep, must_read))
        return drafters

    loop = scripted_loop(link, options, limits, pool, cost, emit, methods, clock.now)
    for request in requests:
        loop.submit(request)
    begun = clock.now_s
    loop.run()
    assert link.drafts.pop().stop
    return VirtualRun(clock.now_s - begun, link.drafts, events, pool.num_available, drafters[0].prompts_read)


def scripted_request(
    request_id: str,
    num_tokens: int,
    max_nodes: int = 4,
    max_depth: int = 4,
    prompt_length: int = 3,
    methods: tuple[str, ...] = ("model",),
) -> Request:
    """A greedy request; what it says does not matter to scripted workers."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    prompt = tuple(range(1, prompt_length + 1))
    return Request(request_id, prompt, sampling, DraftOptions(methods, max_nodes, max_depth))


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
    """`num_sequences` texts of `num_tokens` tokens, drafted as chains: as `support.scripted.run_scripted`.

    The prompts differ in length, so that the drafter is not wrong for all of them at the same time.
    """
    requests = [
        scripted_request(str(i), num_tokens, depth, depth, prompt_length=3 + 7 * i)
        for i in range(num_sequences)
    ]
    latencies = PassProfile((1,), (verify_s,))
    return run_requests(requests, options=options, latencies=latencies, step_s=step_s, is_right=is_right)
