"""Workers that only sleep: a target and a drafter of set latencies, to see what overlaps with what."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

import torch

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine, StepForecast
from outrider.workers.link.link import DraftReceiver, DraftSender
from outrider.workers.link.messages import Draft, Scores, decode_draft
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence, TokenEvent
from outrider.workers.sequences.tree import GrowingNode
from outrider.workers.trace import Tracer
from support.local_engine import queue_links
from support.steps import scores_of, steps_in


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


class ScriptedDrafter:
    """One more token on the deepest path of each tree, every `step_s`; right, or always wrong."""

    def __init__(
        self,
        step_s: float,
        is_right: Callable[[int], bool],
        estimator: AcceptanceEstimator,
        sleep: Callable[[float], None] = time.sleep,
        must_read: bool = False,
    ) -> None:
        """`must_read`: prompts that were not read are not drafted for, as with a real model and long ones."""
        self._must_read = must_read
        self._step_s = step_s
        self._sleep = sleep
        self._estimator = estimator
        self._is_right = is_right  # by position
        self.prompts_read: set[str] = set()

    def start(self, sequence: Sequence) -> None: ...

    def finish(self, sequence: Sequence) -> None: ...

    def root_gains(self, sequences: SequenceABC[Sequence]) -> list[float]:
        return [max(0.5, self._estimator.estimate((1,), 0.5))] * len(sequences)

    def unread(self, sequences: SequenceABC[Sequence]) -> list[int]:
        return [len(s.request.prompt_tokens) for s in sequences if s.id not in self.prompts_read]

    def read_prompts(self, sequences: SequenceABC[Sequence]) -> int:
        num_tokens = sum(self.unread(sequences))
        self.prompts_read |= {sequence.id for sequence in sequences}
        return num_tokens

    def rerooted(self, sequence: Sequence, path: list[int], survivors: dict[int, int]) -> None: ...

    def forecast(self, sequences: SequenceABC[Sequence]) -> StepForecast:
        if self._must_read:
            sequences = [s for s in sequences if s.id in self.prompts_read]
        open_trees = [s for s in sequences if self._deepest(s).depth < s.request.draft.max_depth]
        acceptance = self._estimator.estimate((1,), 0.5)
        gains = sorted((acceptance * self._deepest(s).value for s in open_trees), reverse=True)
        return StepForecast(gains, len(sequences))

    def survival(self, sequences: SequenceABC[Sequence]) -> float:
        return max(self._deepest(s).value * (len(s.tree) > len(s.sent_tree.tokens)) for s in sequences)

    def step(self, sequences: SequenceABC[Sequence]) -> bool:
        open_sequences = [s for s in sequences if self._deepest(s).depth <= 2 * s.request.draft.max_depth]
        if not open_sequences:
            return False
        self._sleep(self._step_s)
        for sequence in open_sequences:
            position = self._deepest(sequence).position + 1
            token = right_token(position) + (0 if self._is_right(position) else 200)
            acceptance = self._estimator.estimate((1,), 0.5)
            sequence.tree.add_child(len(sequence.tree) - 1, token, acceptance, (1,))
        return True

    @staticmethod
    def _deepest(sequence: Sequence) -> GrowingNode:
        return sequence.tree.nodes[-1]  # the tree is a chain


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

    drafting = DraftEngine(NgramConfig())
    drafting.add(ScriptedDrafter(step_s, is_right, drafting.estimator))
    cost = CostModel(PassProfile((1,), (verify_s,)), PassProfile((1,), (step_s,)))
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    loop = RoundLoop(
        DraftSender(draft_end),
        Scheduler(SchedulerLimits(8, 256, 64), PagePool(256, 16, False)),
        drafting,
        cost,
        options,
        Tracer("draft", False),
        events.put,
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
