"""The token loop of the DraftWorker: take commands, plan, draft, send, settle.

`run_serial` does one thing after the other; `run_overlapped` drafts one lane while the target verifies the
other, and lets the trees under verification grow meanwhile. Both use the same helpers, and give the same text.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.link.messages import Draft, Scores, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.rounds.budget import CostModel
from outrider.workers.rounds.growth import GrowthOptions, TreeGrower
from outrider.workers.rounds.outgoing import Round, hidden_wanted, start_message, steps_message
from outrider.workers.rounds.scheduler import PlannedStep, Scheduler
from outrider.workers.rounds.settle import settle_round
from outrider.workers.sequences.rules import RULES, Rule, RuleMaker
from outrider.workers.sequences.sequence import NONE_KEPT, KeptAccount, Request, Sequence, TokenEvent
from outrider.workers.trace import Tracer


class TargetLink(Protocol):
    """The way to the target: rounds go out and their scores come back in the same order."""

    def send(self, draft: Draft) -> None: ...

    def receive(self) -> Scores: ...

    def poll(self) -> bool:
        """Whether `receive` would return at once."""


@dataclass(frozen=True)
class LoopOptions:
    """From the configuration."""

    overlapped: bool
    num_lanes: int
    merge_lanes: bool
    growth: GrowthOptions
    heartbeat_s: float  # an idle loop sends empty rounds, so that a group's time limit means a dead peer


@dataclass(frozen=True)
class FinishedCounts:
    """Of the requests under one rule that ended, in whatever way."""

    num_requests: int = 0
    num_tokens: int = 0
    kept: KeptAccount = NONE_KEPT

    def plus(self, sequence: Sequence) -> FinishedCounts:
        """With one more."""
        return FinishedCounts(
            self.num_requests + 1,
            self.num_tokens + sequence.num_output,
            self.kept.plus(sequence.stats.kept),
        )


class RoundLoop:
    """Drives rounds until stopped. `submit`, `cancel` and `stop` may be called from other threads."""

    def __init__(
        self,
        link: TargetLink,
        scheduler: Scheduler,
        drafting: DraftEngine,
        cost: CostModel,
        options: LoopOptions,
        tracer: Tracer,
        emit: Callable[[TokenEvent], None],
        rules: Mapping[str, RuleMaker] = RULES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """rules: by the names under which requests ask for them; clock: seconds; a virtual one lets a run be planned,
        or tested, without its time passing."""
        self.scheduler = scheduler
        self.cost = cost
        self._link = link
        self._drafting = drafting
        self._grower = TreeGrower(drafting, scheduler, cost, options.growth, tracer, clock)
        self._options = options
        self._tracer = tracer
        self._emit = emit
        self._rules = rules
        self._clock = clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._num_rounds = 0
        self.finished: dict[str, FinishedCounts] = {}  # by rule

    def submit(self, request: Request) -> None:
        """Queue a request; its tokens come through `emit`."""
        self._commands.put(lambda: self.scheduler.submit(request))

    def cancel(self, request_id: str) -> None:
        """End a request; its pages are free within a round. Unknown and finished ids are ignored."""
        self._commands.put(lambda: self._cancel(request_id))

    def stop(self) -> None:
        """End the loop after the rounds under way."""
        self._commands.put(self._set_stopping)

    def run(self) -> None:
        """Run rounds until `stop`; then tell the target to stop, too."""
        if self._options.overlapped:
            self.run_overlapped()
        else:
            self.run_serial()
        self._link.send(Draft(self._num_rounds, (), (), Steps.of([]), stop=True))

    def run_serial(self) -> None:
        """Draft, verify, settle, one lane after the other."""
        while self._take_commands(may_wait=True):
            self._assign_lanes()
            for lane in range(self._options.num_lanes):
                steps = self._plan(lane)
                if steps:
                    self._grower.read_prompts(steps)
                    under_way = self._send(lane, steps)
                    self._settle(under_way, self._receive())

    def run_overlapped(self) -> None:
        """Keep every lane either in the drafter's hands or the target's."""
        in_flight: deque[Round] = deque()
        while self._take_commands(may_wait=not in_flight) or in_flight:
            if not self._stopping:
                self._assign_lanes()
                for lane in set(range(self._options.num_lanes)) - {r.lane for r in in_flight}:
                    steps = self._plan(lane)
                    if steps:
                        in_flight.append(self._send(lane, steps))
                        self._grower.read_prompts(steps)
            if in_flight:
                first = in_flight[0]
                self._grower.grow_ahead(first.steps, first.trees, first.expected_at, self._link.poll)
                self._settle(in_flight.popleft(), self._receive())

    # What both loops are made of.

    def _take_commands(self, may_wait: bool) -> bool:
        """Carry out what other threads asked for; wait while there is nothing to do. False once stopping."""
        while True:
            try:
                wait = may_wait and self.scheduler.is_idle and not self._stopping
                self._commands.get(block=wait, timeout=self._options.heartbeat_s if wait else None)()
            except queue.Empty:
                if not wait:
                    return not self._stopping
                self._heartbeat()

    def _assign_lanes(self) -> None:
        with self._tracer.span("schedule"):
            for sequence in self.scheduler.assign_lanes(self._num_lanes()):
                self._drafting.start(sequence)

    def _num_lanes(self) -> int:
        num_unfinished = len(self.scheduler.running) + len(self.scheduler.waiting)
        if self._options.num_lanes == 1 or num_unfinished < 2:
            return 1
        may_merge = self._options.merge_lanes and self._options.overlapped
        costs = self._options.growth.draft_costs
        if may_merge and (costs or self.cost.one_lane_is_faster(num_unfinished)):
            return 1
        return self._options.num_lanes

    def _plan(self, lane: int) -> list[PlannedStep]:
        with self._tracer.span("schedule"):
            return self.scheduler.plan(lane)

    def _send(self, lane: int, steps: list[PlannedStep]) -> Round:
        """Draft, and put the round on its way."""
        trees = self._grower.grow(steps)
        with self._tracer.span("communicate"):
            self._num_rounds += 1
            starts = [self._start(s.sequence) for s in steps if not s.sequence.started]
            first_hidden, layers = hidden_wanted(steps, trees, self._drafting, self._rules_of(steps))
            chain_lengths = np.array([step.chain_length for step in steps], dtype=np.int64)
            num_rows = sum(chain_lengths.tolist()) + sum([max(0, n - 1) for n in trees.counts.tolist()])
            begins_at = max(self._clock(), self._grower.target_busy_until)
            self._grower.target_busy_until = begins_at + self.cost.target_s(num_rows)
            round_ = Round(
                round_id=self._num_rounds,
                lane=lane,
                steps=tuple(steps),
                trees=trees,
                chain_lengths=chain_lengths,
                num_known=np.array([step.sequence.num_committed for step in steps], dtype=np.int64),
                first_hidden=first_hidden,
                layers=layers,
                expected_at=self._grower.target_busy_until,
            )
            self._link.send(
                Draft(
                    self._num_rounds,
                    tuple(starts),
                    self._take_released(),
                    steps_message(round_),
                    layers,
                )
            )
            for step in steps:
                step.sequence.in_flight = True
                self.scheduler.commit_sent(step.sequence)
            return round_

    def _start(self, sequence: Sequence) -> SequenceStart:
        sequence.started = True
        sequence.num_pages_sent = 0
        return start_message(sequence, self._rule_of(sequence))

    def _receive(self) -> Scores:
        with self._tracer.span("wait"):
            return self._link.receive()

    def _settle(self, under_way: Round, scores: Scores) -> None:
        """Turn scores into tokens, and make the sequences ready for their next round."""
        assert scores.round_id == under_way.round_id, (scores.round_id, under_way.round_id)
        num_rows = sum(under_way.num_nodes.tolist())
        # A prompt's rows cost otherwise than those of trees: fewer sequences, and only the last one is sampled.
        if sum(under_way.chain_lengths.tolist()) <= 2 * len(under_way.steps):
            self.cost.observe_target(num_rows, scores.commit_s + scores.forward_s + scores.sample_s)
        with self._tracer.span("verify", num_rows):
            for step in under_way.steps:
                step.sequence.in_flight = False
            rules = self._rules_of(under_way.steps)
            for outcome in settle_round(under_way, scores, rules, self._drafting):
                if outcome.event.finish_reason:
                    self._finish(outcome.sequence)
                if outcome.event.tokens or outcome.event.finish_reason:
                    self._emit(outcome.event)

    def _cancel(self, request_id: str) -> None:
        sequence = self.scheduler.find(request_id)
        if sequence is None:
            return
        sequence.cancelled = True
        if not sequence.in_flight:  # otherwise it ends when its round settles
            self._finish(sequence)
            self._emit(TokenEvent(request_id, (), (), (), "cancelled", "", sequence.stats))

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        rule = sequence.request.acceptance.rule
        self.finished[rule] = self.finished.get(rule, FinishedCounts()).plus(sequence)

    def _rules_of(self, steps: SequenceABC[PlannedStep]) -> list[Rule]:
        return [self._rule_of(step.sequence) for step in steps]

    def _rule_of(self, sequence: Sequence) -> Rule:
        options = sequence.request.acceptance
        return self._rules[options.rule](options)

    def _set_stopping(self) -> None:
        self._stopping = True

    def _take_released(self) -> tuple[int, ...]:
        released, self.scheduler.released_slots = tuple(self.scheduler.released_slots), []
        return released

    def _heartbeat(self) -> None:
        self._num_rounds += 1
        self._link.send(Draft(self._num_rounds, (), self._take_released(), Steps.of([])))
        self._link.receive()
