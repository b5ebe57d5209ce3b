"""The token loop of the DraftWorker: draft, send, receive, settle.

`run_serial` does one thing after the other; `run_overlapped` drafts one lane while the target verifies the
other, and lets the trees under verification grow meanwhile. Both use the same helpers, and give the same text.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from outrider.workers.drafting.engine import DraftEngine, StepForecast
from outrider.workers.link.messages import Draft, Scores, SequenceStart, SequenceStep
from outrider.workers.rounds.budget import CostModel
from outrider.workers.rounds.scheduler import PlannedStep, Scheduler
from outrider.workers.rounds.settle import settle_step
from outrider.workers.sequences.sequence import Request, Sequence, TokenEvent
from outrider.workers.sequences.tree import DraftTree
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
    draft_ahead: bool
    fixed_budget: bool
    draft_costs: bool  # drafting takes processor time from the target, also when it overlaps
    max_round_tokens: int
    heartbeat_s: float  # an idle loop sends empty rounds, so that a group's time limit means a dead peer


@dataclass(frozen=True)
class Round:
    """A round under verification."""

    round_id: int
    lane: int
    steps: tuple[PlannedStep, ...]
    num_rows: int
    expected_at: float  # monotonic seconds at which the scores should be here


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
    ) -> None:
        self.scheduler = scheduler
        self.cost = cost
        self._link = link
        self._drafting = drafting
        self._options = options
        self._tracer = tracer
        self._emit = emit
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._num_rounds = 0
        self._new_starts: list[SequenceStart] = []
        self._last_expected_at = 0.0

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
        self._link.send(Draft(self._num_rounds, (), (), (), stop=True))

    def run_serial(self) -> None:
        """Draft, verify, settle, one lane after the other."""
        while self._take_commands(may_wait=True):
            self._assign_lanes()
            for lane in range(self._options.num_lanes):
                steps = self._plan(lane)
                if steps:
                    self._read_prompts(steps)
                    self._draft(steps)
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
                        self._draft(steps)
                        in_flight.append(self._send(lane, steps))
                        self._read_prompts(steps)
            if in_flight:
                self._draft_ahead(in_flight[0])
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
        if may_merge and (self._options.draft_costs or self.cost.one_lane_is_faster(num_unfinished)):
            return 1
        return self._options.num_lanes

    def _plan(self, lane: int) -> list[PlannedStep]:
        with self._tracer.span("schedule"):
            return self.scheduler.plan(lane)

    def _read_prompts(self, steps: list[PlannedStep]) -> None:
        """The draft model reads a chunk of what it lacks, mostly prompts."""
        sequences = [s.sequence for s in steps]
        if not self._reading_pays(sequences):
            return
        begun = time.monotonic()
        with self._tracer.span("draft", len(steps)):
            num_tokens = self._drafting.read_prompts(sequences)
        if num_tokens:
            self.cost.observe_reading(num_tokens, time.monotonic() - begun)

    def _reading_pays(self, sequences: list[Sequence]) -> bool:
        """Whether later steps will save more time than reading takes, where that keeps the target from working.

        With many sequences no step pays; what was not read is read when enough of them have left.
        """
        unread = self._drafting.unread(sequences)
        if not unread or self._options.fixed_budget or not self._options.draft_costs:
            return True
        unfinished = [*self.scheduler.running, *self.scheduler.waiting][: self.scheduler.limits.max_sequences]
        saved_s = self.cost.saved_by_step(
            values=[],
            num_base_rows=len(unfinished),
            num_sequences=len(unfinished),
            drafted_s=0.0,
            step_gains=self._drafting.root_gains(unfinished),
            step_s=self.cost.draft_step_s(len(unfinished)),
        )
        # A round with a step gives at most two tokens for each sequence.
        num_rounds = sum(s.num_remaining for s in sequences) / len(sequences) / 2
        share = len(unread) / len(unfinished)  # of what a step saves
        pays = share * saved_s * num_rounds > self.cost.read_s(sum(unread))
        if not pays:
            self.cost.doubt_draft_steps()
        return pays

    def _draft(self, steps: list[PlannedStep]) -> None:
        """Grow the trees of the sequences that are about to be verified, then cut them to what pays."""
        begun = time.monotonic()
        drafted = [s for s in steps if s.reaches_end and s.sequence.request.draft.max_nodes > 0]
        sequences = [s.sequence for s in drafted]
        with self._tracer.span("draft", len(sequences)):
            afresh = [s for s in drafted if len(s.sequence.tree) == 1]
            self._drafting.look_up(sequences)
            while forecast := self._next_step(steps, drafted, afresh, begun):
                if not self._step(sequences, forecast):
                    break
            self._cut(steps, drafted, self._charged_s(begun, time.monotonic()))
        if sequences:
            self.cost.observe_draft_round(time.monotonic() - begun)

    def _step(self, sequences: list[Sequence], forecast: StepForecast) -> bool:
        """One step of the draft model; False when nothing was left to do."""
        begun = time.monotonic()
        if not self._drafting.step(sequences):
            return False
        self.cost.observe_draft_step(forecast.num_rows, time.monotonic() - begun)
        return True

    def _charged_s(self, begun: float, now: float) -> float:
        """Seconds since `begun` that drafting keeps the target from working; none while it has work anyway."""
        if self._options.draft_costs:
            return now - begun
        return max(0.0, now - max(begun, self._last_expected_at))

    def _next_step(
        self, steps: list[PlannedStep], drafted: list[PlannedStep], afresh: list[PlannedStep], begun: float
    ) -> StepForecast | None:
        """What another step of the draft model would do; None if it does not pay."""
        forecast = self._drafting.forecast([s.sequence for s in drafted])
        if not forecast.gains:
            return None
        if self._options.fixed_budget:
            # What survived a verdict is sent at once; trees that were started afresh are filled.
            return forecast if any(self._has_room_to_grow(s) for s in afresh) else None
        values = sorted((v for s in drafted for v, _ in self._offer(s)), reverse=True)
        base_rows = sum(s.chain_length for s in steps)
        now = time.monotonic()
        drafted_s = self._charged_s(begun, now)
        step_s = self._charged_s(begun, now + self.cost.draft_step_s(forecast.num_rows)) - drafted_s
        num_sampling = _num_sampling(steps)
        saved_s = self.cost.saved_by_step(values, base_rows, num_sampling, drafted_s, forecast.gains, step_s)
        if saved_s <= 0.0:
            self.cost.doubt_draft_steps()
            return None
        return forecast

    def _has_room_to_grow(self, step: PlannedStep) -> bool:
        is_full = len(self._offer(step)) == step.sequence.request.draft.max_nodes
        return not is_full and bool(self._drafting.forecast([step.sequence]).gains)

    def _offer(self, step: PlannedStep) -> list[tuple[float, int]]:
        """(value, node) of the draft nodes that this step may verify, best first."""
        sequence, options = step.sequence, step.sequence.request.draft
        # The round emits one token more than it accepts, so the last one needs no draft.
        depth = min(options.max_depth, sequence.num_remaining - 1)
        nodes = sequence.tree.best(options.max_nodes, depth)
        return [(sequence.tree.nodes[n].value, n) for n in nodes]

    def _cut(self, steps: list[PlannedStep], drafted: list[PlannedStep], drafted_s: float) -> None:
        """Choose the nodes of this round over all its sequences, and hold KV pages for them."""
        for step in steps:
            step.sequence.sent_chain = step.chain_length
            step.sequence.sent_tree = DraftTree.root_only(step.sequence.tokens[-1])
        base_rows = sum(s.chain_length for s in steps)
        offers = [(value, -i, node) for i, step in enumerate(drafted) for value, node in self._offer(step)]
        offers.sort(key=lambda offer: -offer[0])  # stable: parents stay before their children
        count = min(len(offers), self._options.max_round_tokens - base_rows)
        if not self._options.fixed_budget:
            values = [value for value, _, _ in offers[:count]]
            count = self.cost.best_num_nodes(values, base_rows, _num_sampling(steps), drafted_s)
        for i, step in enumerate(drafted):
            chosen = [node for _, owner, node in offers[:count] if owner == -i]
            chosen = chosen[: self.scheduler.tree_room(step)]
            if chosen:
                self.scheduler.take_tree_pages(step, len(chosen))
                step.sequence.sent_tree = step.sequence.tree.cut(chosen)

    def _send(self, lane: int, steps: list[PlannedStep]) -> Round:
        with self._tracer.span("communicate"):
            self._num_rounds += 1
            starts = [self._start(s.sequence) for s in steps if not s.sequence.started]
            message_steps = tuple(self._message_step(s) for s in steps)
            released, self.scheduler.released_slots = tuple(self.scheduler.released_slots), []
            self._link.send(Draft(self._num_rounds, tuple(starts), released, message_steps))
            for step in steps:
                step.sequence.in_flight = True
                self.scheduler.commit_sent(step.sequence)
            num_rows = sum(len(s.tokens) for s in message_steps)
            begins_at = max(time.monotonic(), self._last_expected_at)
            self._last_expected_at = begins_at + self.cost.target_s(num_rows)
            return Round(self._num_rounds, lane, tuple(steps), num_rows, self._last_expected_at)

    def _start(self, sequence: Sequence) -> SequenceStart:
        sequence.started = True
        sequence.num_pages_sent = 0
        return SequenceStart(
            slot=sequence.slot,
            prompt_length=len(sequence.request.prompt_tokens),
            num_shared_tokens=sequence.num_committed,
            sampling=sequence.request.sampling,
        )

    def _message_step(self, step: PlannedStep) -> SequenceStep:
        """The chain of known tokens with the draft tree below its last one, as one list of nodes."""
        sequence, length, tree = step.sequence, step.chain_length, step.sequence.sent_tree
        chain = sequence.tokens[sequence.num_committed : sequence.num_committed + length]
        new_pages = tuple(sequence.pages[sequence.num_pages_sent :])
        sequence.num_pages_sent = len(sequence.pages)
        accepted, sequence.pending_accepted = sequence.pending_accepted, ()
        drafts = tree.tokens[1:] if step.reaches_end else ()
        draft_parents = [parent + length - 1 for parent in tree.parents[1:]] if step.reaches_end else []
        return SequenceStep(
            slot=sequence.slot,
            accepted=accepted,
            new_pages=new_pages,
            tokens=(*chain, *drafts),
            parents=(0, *range(length - 1), *draft_parents),
            first_sampled=length - 1 if step.reaches_end else length,
        )

    def _draft_ahead(self, under_way: Round) -> None:
        """Grow the trees that the target is verifying, until the scores come.

        A step that makes the scores wait costs that wait, and saves a whole step if it survives the verdict:
        it is begun only where that pays, so nothing is lost when the drafts are always wrong.
        """
        if not self._options.draft_ahead:
            return
        sequences = [s.sequence for s in under_way.steps if s.reaches_end]
        sequences = [s for s in sequences if s.request.draft.max_nodes > 0]
        while sequences and not self._link.poll():
            forecast = self._drafting.forecast(sequences)
            step_s = self.cost.draft_step_s(forecast.num_rows)
            fitting_fraction = (under_way.expected_at - time.monotonic()) / max(step_s, 1e-9)
            if fitting_fraction < 1.0 - self._drafting.survival(sequences):
                return
            with self._tracer.span("draft", len(sequences)):
                if not self._step(sequences, forecast):
                    return

    def _receive(self) -> Scores:
        with self._tracer.span("wait"):
            return self._link.receive()

    def _settle(self, under_way: Round, scores: Scores) -> None:
        """Turn scores into tokens, and make the sequences ready for their next round."""
        assert scores.round_id == under_way.round_id, (scores.round_id, under_way.round_id)
        # A prompt's rows cost otherwise than those of trees: fewer sequences, and only the last one is sampled.
        if sum(step.chain_length for step in under_way.steps) <= 2 * len(under_way.steps):
            target_s = scores.commit_s + scores.forward_s + scores.sample_s
            self.cost.observe_target(under_way.num_rows, target_s)
        with self._tracer.span("verify", under_way.num_rows):
            for step, step_scores in zip(under_way.steps, scores.steps, strict=True):
                sequence = step.sequence
                sequence.in_flight = False
                event = settle_step(step, step_scores, self._drafting)
                if event.finish_reason:
                    self._drafting.finish(sequence)
                    self.scheduler.finish(sequence)
                if event.tokens or event.finish_reason:
                    self._emit(event)

    def _cancel(self, request_id: str) -> None:
        sequence = self.scheduler.find(request_id)
        if sequence is None:
            return
        sequence.cancelled = True
        if not sequence.in_flight:  # otherwise it ends when its round settles
            self._drafting.finish(sequence)
            self.scheduler.finish(sequence)
            self._emit(TokenEvent(request_id, (), (), (), "cancelled", "", sequence.stats))

    def _set_stopping(self) -> None:
        self._stopping = True

    def _heartbeat(self) -> None:
        self._num_rounds += 1
        released, self.scheduler.released_slots = tuple(self.scheduler.released_slots), []
        self._link.send(Draft(self._num_rounds, (), released, ()))
        self._link.receive()


def _num_sampling(steps: list[PlannedStep]) -> int:
    """Sequences that get a token of the target's own from this round; the others are in the middle of a prompt."""
    return sum(step.reaches_end for step in steps)
