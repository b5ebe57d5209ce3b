"""Workers that only sleep: a target and a drafter of set latencies, to see what overlaps with what."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from typing import Self

import numpy as np
import torch

from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod, Forecast, MethodContext
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.link import DraftReceiver, DraftSender
from outrider.workers.link.messages import Draft, Scores, decode_draft
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.loop import LoopOptions, RoundLoop, TargetLink
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence, TokenEvent
from outrider.workers.sequences.tree import DraftTrees, Floats, Ints
from outrider.workers.trace import Tracer
from support.local_engine import queue_links
from support.steps import scores_of, steps_in

_MAX_NODES = 32


def right_token(position: int) -> int:
    """The scripted target's token at a position, whatever came before."""
    return (position * 7 + 3) % 101


class ScriptedTarget:
    """Answers a round after `verify_s`, whatever its size."""

    def __init__(self, verify_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._verify_s = verify_s
        self._sleep = sleep
        self._context: dict[int, int] = {}

    def step(self, draft: Draft) -> Scores:
        for slot in draft.released_slots:
            del self._context[slot]
        for start in draft.starts:
            self._context[start.slot] = start.num_shared_tokens
        sampled: list[int] = []
        for step in steps_in(draft.steps):
            self._context[step.slot] += len(step.accepted)
            depths = [0]
            for node in range(1, len(step.tokens)):
                depths.append(depths[step.parents[node]] + 1)
            first = self._context[step.slot] + 1
            sampled += [right_token(first + depth) for depth in depths[step.first_sampled :]]
        if len(draft.steps):
            self._sleep(self._verify_s)
        return scores_of(draft.round_id, sampled, self._verify_s)


class ScriptedMethod(DraftMethod):
    """One more token on the deepest path of each tree, every `step_s`; right, or always wrong."""

    name = "model"

    def __init__(
        self,
        slots: DraftedSlots,
        estimator: AcceptanceEstimator,
        step_s: float,
        is_right: Callable[[int], bool],
        sleep: Callable[[float], None] = time.sleep,
        must_read: bool = False,
    ) -> None:
        """`is_right`: by position; `must_read`: prompts that were not read are not drafted for, as with a real model
        and long ones.
        """
        super().__init__(slots, estimator)
        self.prompts_read: set[str] = set()
        self._source = estimator.reserve(1)
        self._step_s = step_s
        self._is_right = is_right
        self._sleep = sleep
        self._must_read = must_read

    @classmethod
    def build(cls, context: MethodContext) -> Self:
        return cls(context.slots, context.estimator, 0.0, lambda position: True)

    def root_gains(self, laws: Ints) -> Floats:
        return np.full(len(laws), max(0.5, self._estimate()))

    def unread(self, slots: Ints) -> Ints:
        return np.array([len(s.request.prompt_tokens) for s in self._unread(slots)], dtype=np.int64)

    def read(self, slots: Ints) -> int:
        num_tokens = int(self.unread(slots).sum())
        self.prompts_read |= {sequence.id for sequence in self._unread(slots)}
        return num_tokens

    def forecast(self, slots: Ints) -> Forecast:
        if self._must_read:
            unread = {sequence.slot for sequence in self._unread(slots)}
            slots = np.array([slot for slot in slots.tolist() if slot not in unread], dtype=np.int64)
        deepest = self.trees.num_nodes[slots] - 1  # the trees are chains
        gains = self._estimate() * self.trees.values[slots, deepest]
        growing = slots[deepest <= 2 * self.slots.max_depth[slots]]
        return Forecast(np.sort(gains[deepest < self.slots.max_depth[slots]])[::-1], len(growing), growing)

    def survival(self, slots: Ints, sent: DraftTrees) -> float:
        num_nodes = self.trees.num_nodes[slots]
        return float((self.trees.values[slots, num_nodes - 1] * (num_nodes > sent.counts)).max(initial=0.0))

    def expand(self, slots: Ints) -> bool:
        slots = slots[self.trees.num_nodes[slots] <= 2 * self.slots.max_depth[slots] + 1]
        if not len(slots):
            return False
        self._sleep(self._step_s)
        deepest = self.trees.num_nodes[slots] - 1
        positions = (self.trees.root_positions[slots] + deepest + 1).tolist()
        tokens = [right_token(p) + (0 if self._is_right(p) else 200) for p in positions]
        sources = np.full(len(slots), self._source)
        estimates = np.full(len(slots), self._estimate())
        self.trees.add_children(slots, deepest, np.array(tokens), estimates, sources)
        return True

    def _unread(self, slots: Ints) -> list[Sequence]:
        sequences = [self.slots.sequence(slot) for slot in slots.tolist()]
        return [sequence for sequence in sequences if sequence.id not in self.prompts_read]

    def _estimate(self) -> float:
        return float(self.estimator.estimate(np.array([self._source]), np.array([0.5]))[0])


def scripted_loop(
    link: TargetLink,
    options: LoopOptions,
    limits: SchedulerLimits,
    pool: PagePool,
    cost: CostModel,
    emit: Callable[[TokenEvent], None],
    methods: Callable[[DraftedSlots, AcceptanceEstimator], SequenceABC[DraftMethod]] = lambda *_: (),
    clock: Callable[[], float] = time.monotonic,
) -> RoundLoop:
    """A loop whose methods `methods` builds."""
    drafting = DraftEngine(DraftedSlots(limits.max_sequences, _MAX_NODES, _MAX_NODES))
    for method in methods(drafting.slots, drafting.estimator):
        drafting.add(method)
    scheduler = Scheduler(limits, pool, drafting.prefix_kept, drafting.finish)
    return RoundLoop(link, scheduler, drafting, cost, options, Tracer("draft", False), emit, clock=clock)


def run_scripted(
    *,
    verify_s: float,
    step_s: float,
    depth: int,
    options: LoopOptions,
    num_sequences: int,
    num_tokens: int,
    is_right: Callable[[int], bool],
) -> tuple[float, dict[str, list[int]]]:
    """Seconds that `num_sequences` texts of `num_tokens` take, and the texts."""
    draft_end, target_end = queue_links()
    receiver = DraftReceiver(target_end)
    target = ScriptedTarget(verify_s)

    def serve() -> None:
        while True:
            draft = decode_draft(receiver.receive_message())
            if draft.stop:
                return
            receiver.send(target.step(draft))

    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    loop = scripted_loop(
        DraftSender(draft_end),
        options,
        SchedulerLimits(8, 256, 64),
        PagePool(256, 16, False),
        CostModel(PassProfile((1,), (verify_s,)), {ScriptedMethod.name: PassProfile((1,), (step_s,))}),
        events.put,
        lambda slots, estimator: [ScriptedMethod(slots, estimator, step_s, is_right)],
    )
    for i in range(num_sequences):
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        loop.submit(Request(str(i), (1, 2, 3), sampling, DraftOptions(("model",), depth, depth)))
    threads = [threading.Thread(target=serve, daemon=True), threading.Thread(target=loop.run, daemon=True)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    texts: dict[str, list[int]] = {str(i): [] for i in range(num_sequences)}
    unfinished = set(texts)
    while unfinished:
        event = events.get(timeout=60)
        texts[event.request_id] += event.tokens
        if event.finish_reason:
            unfinished.discard(event.request_id)
    seconds = time.monotonic() - begun
    loop.stop()
    for thread in threads:
        thread.join(timeout=10)
    torch.set_num_threads(1)
    return seconds, texts
