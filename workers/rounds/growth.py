"""How the trees of a round come about: methods take steps as long as they pay, then the trees are cut to size."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod, Forecast
from outrider.workers.rounds.budget import CostModel
from outrider.workers.rounds.scheduler import PlannedStep, Scheduler
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import DraftTrees, Ints, Offers
from outrider.workers.trace import Tracer


@dataclass(frozen=True)
class GrowthOptions:
    """From the configuration."""

    draft_ahead: bool
    fixed_budget: bool
    draft_costs: bool  # drafting takes processor time from the target, also when it overlaps
    max_round_tokens: int


@dataclass
class _Drafted:
    """The steps of a round that are drafted: they reach the end of what is known, and may have a tree."""

    indices: list[int]  # among the round's steps
    slots: Ints  # [B]
    max_depths: Ints  # [B] of nodes that the round may verify
    max_nodes: Ints  # [B] drafted nodes that the round may verify
    afresh: Ints  # [b] indices of the trees that were roots when drafting began
    num_base_rows: int  # rows of the round without any tree
    num_sampling: (
        int  # sequences that get a token of the target's own; the others are in the middle of a prompt
    )
    begun: float


class TreeGrower:
    """Grows and cuts trees, going by what steps and rows were seen to cost."""

    def __init__(
        self,
        drafting: DraftEngine,
        scheduler: Scheduler,
        cost: CostModel,
        options: GrowthOptions,
        tracer: Tracer,
        clock: Callable[[], float],
    ) -> None:
        self.drafting = drafting
        self.cost = cost
        self.target_busy_until = 0.0  # by `clock`: until then drafting keeps nobody waiting
        self._scheduler = scheduler
        self._options = options
        self._tracer = tracer
        self._clock = clock

    def grow(self, steps: SequenceABC[PlannedStep]) -> DraftTrees:
        """Grow the trees of the sequences that are about to be verified, and cut them to what pays.

        Returns a row per step: a root alone where nothing is drafted, no node where a prompt is not read to its end.
        KV pages are held for every node.
        """
        with self._tracer.span("draft", len(steps)):
            drafted = self._drafted(steps)
            if not len(drafted.slots):
                return _without_drafts(steps)
            self.drafting.look_up(drafted.slots)
            while chosen := self._next_step(drafted):
                method, forecast = chosen
                if not self._step(
                    method, forecast, drafted.slots, self._num_further(method, forecast, drafted)
                ):
                    break
            trees = self._cut(steps, drafted)
        self.cost.observe_draft_round(self._clock() - drafted.begun)
        return trees

    def grow_ahead(
        self, steps: SequenceABC[PlannedStep], sent: DraftTrees, expected_at: float, poll: Callable[[], bool]
    ) -> None:
        """Grow the trees that the target is verifying, until the scores come (`poll`).

        A step that makes the scores wait costs that wait, and saves a whole step if it survives the verdict:
        it is begun only where that pays, so nothing is lost when the drafts are always wrong. On the target's own
        processors each makes the scores wait for as long as it takes, and never pays.
        """
        if not self._options.draft_ahead or self._options.draft_costs:
            return
        drafted = self._drafted(steps)
        if not len(drafted.slots):
            return
        sent = sent.rows(np.array(drafted.indices))
        while not poll():
            for method, forecast in self.drafting.forecasts(drafted.slots):
                step_s = self.cost.step_s(method.name, forecast.num_rows)
                fitting_fraction = (expected_at - self._clock()) / max(step_s, 1e-9)
                if fitting_fraction >= 1.0 - self.drafting.survival(method, drafted.slots, sent):
                    break
            else:
                return
            with self._tracer.span("draft", len(drafted.slots)):
                if not self._step(method, forecast, drafted.slots):
                    return

    def read_prompts(self, steps: SequenceABC[PlannedStep]) -> None:
        """Let every method read a chunk of what it lacks, mostly prompts."""
        sequences = [step.sequence for step in steps]
        slots = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        for method in self.drafting.methods:
            unread = self.drafting.unread(method, slots)
            if not len(unread) or not self._reading_pays(method, sequences, unread):
                continue
            begun = self._clock()
            with self._tracer.span("draft", len(steps)):
                num_tokens = self.drafting.read(method, slots)
            if num_tokens:
                self.cost.observe_reading(method.name, num_tokens, self._clock() - begun)

    def _reading_pays(self, method: DraftMethod, sequences: list[Sequence], unread: Ints) -> bool:
        """Whether later steps will save more time than reading takes, where that keeps the target from working.

        With many sequences no step pays; what was not read is read when enough of them have left.
        """
        if self._options.fixed_budget or not self._options.draft_costs:
            return True
        unfinished = [*self._scheduler.running, *self._scheduler.waiting]
        unfinished = unfinished[: self._scheduler.limits.max_sequences]
        saved_s = self.cost.saved_by_step(
            values=np.zeros(0),
            num_base_rows=len(unfinished),
            num_sequences=len(unfinished),
            drafted_s=0.0,
            step_gains=self.drafting.root_gains(method, unfinished),
            step_s=self.cost.step_s(method.name, len(unfinished)),
        )
        # A round with a step gives at most two tokens for each sequence.
        num_rounds = sum(s.num_remaining for s in sequences) / len(sequences) / 2
        share = len(unread) / len(unfinished)  # of what a step saves
        pays = share * saved_s * num_rounds > self.cost.read_s(method.name, int(unread.sum()))
        if not pays:
            self.cost.doubt_steps(method.name)
        return pays

    def _drafted(self, steps: SequenceABC[PlannedStep]) -> _Drafted:
        indices = [i for i, s in enumerate(steps) if s.reaches_end and s.sequence.request.draft.max_nodes > 0]
        slots = np.array([steps[i].sequence.slot for i in indices], dtype=np.int64)
        return _Drafted(
            indices=indices,
            slots=slots,
            max_depths=self.drafting.slots.round_depths(slots),
            max_nodes=self.drafting.slots.max_nodes[slots],
            afresh=(self.drafting.trees.num_nodes[slots] == 1).nonzero()[0],
            num_base_rows=sum([step.chain_length for step in steps]),
            num_sampling=sum([step.reaches_end for step in steps]),
            begun=self._clock(),
        )

    def _step(self, method: DraftMethod, forecast: Forecast, slots: Ints, num_further: int = 0) -> bool:
        """A step of a method, and further ones behind it; False when nothing was left to do."""
        begun = self._clock()
        num_steps = self.drafting.expand(method, slots, num_further)
        if not num_steps:
            return False
        # All have as much to read of the drafter's weights.
        step_s = (self._clock() - begun) / num_steps
        self.cost.observe_step(method.name, forecast.num_rows, step_s)
        return True

    def _num_further(self, method: DraftMethod, forecast: Forecast, drafted: _Drafted) -> int:
        """How many steps pay behind one that does, where the method takes them without a look at the trees."""
        following = forecast.following
        if following.most < 1:
            return 0
        if self._options.fixed_budget:
            return self._num_filling(forecast, drafted)
        offers = self._offers(drafted)
        values, gains = offers.values[offers.values > 0.0], forecast.gains
        now, step_s = self._clock(), self.cost.step_s(method.name, forecast.num_rows)
        for count in range(following.most):
            values, gains = np.sort(np.concatenate([values, gains]))[::-1], gains * following.decay
            drafted_s, later_s = (
                self._charged_s(drafted.begun, now + steps * step_s) for steps in (count + 1, count + 2)
            )
            saved_s = self.cost.saved_by_step(
                values,
                drafted.num_base_rows,
                drafted.num_sampling,
                drafted_s,
                gains,
                later_s - drafted_s,
            )
            if saved_s <= 0.0:
                return count
        return following.most

    def _num_filling(self, forecast: Forecast, drafted: _Drafted) -> int:
        """How many steps behind the next one a fixed budget needs, if proposals fall on nodes of their own."""
        following, room = forecast.following, int(drafted.max_nodes.max()) + 1
        num_nodes = int(self.drafting.trees.num_nodes[forecast.slots].min())
        num_rows = -(-forecast.num_rows // len(forecast.slots))
        for count in range(following.most):
            num_nodes += num_rows * following.num_proposals
            if num_nodes >= room:
                return count
            num_rows = following.rows_per_sequence
        return following.most

    def _charged_s(self, begun: float, now: float) -> float:
        """Seconds since `begun` that drafting keeps the target from working; none while it has work anyway."""
        if self._options.draft_costs:
            return now - begun
        return max(0.0, now - max(begun, self.target_busy_until))

    def _offers(self, drafted: _Drafted) -> Offers:
        """The draft nodes that a round may verify."""
        return self.drafting.trees.offers(drafted.slots, drafted.max_depths, drafted.max_nodes)

    def _next_step(self, drafted: _Drafted) -> tuple[DraftMethod, Forecast] | None:
        """The step that saves most, and what it would do; None if none pays."""
        if self._options.fixed_budget:
            return self._filling_step(drafted)
        forecasts = self.drafting.forecasts(drafted.slots)
        if not forecasts:
            return None
        offers = self._offers(drafted)
        values = np.sort(offers.values[offers.values > 0.0])[::-1]
        now = self._clock()
        drafted_s = self._charged_s(drafted.begun, now)
        best_s, best = 0.0, None
        for method, forecast in forecasts:
            step_s = self.cost.step_s(method.name, forecast.num_rows)
            saved_s = self.cost.saved_by_step(
                values,
                drafted.num_base_rows,
                drafted.num_sampling,
                drafted_s,
                forecast.gains,
                self._charged_s(drafted.begun, now + step_s) - drafted_s,
            )
            if saved_s <= 0.0:
                self.cost.doubt_steps(method.name)
            elif saved_s > best_s:
                best_s, best = saved_s, (method, forecast)
        return best

    def _filling_step(self, drafted: _Drafted) -> tuple[DraftMethod, Forecast] | None:
        """Under a fixed budget what survived a verdict is sent at once; trees that were started afresh are filled."""
        if not len(drafted.afresh):
            return None
        slots, max_nodes = drafted.slots[drafted.afresh], drafted.max_nodes[drafted.afresh]
        # Trees of no more nodes than that need not be looked at.
        unfilled = self.drafting.trees.num_nodes[slots] <= max_nodes
        if np.count_nonzero(unfilled) < len(slots):
            num_offered = self.drafting.trees.count_offers(slots, drafted.max_depths[drafted.afresh])
            unfilled = num_offered < max_nodes
        wanting = {*slots[unfilled].tolist()}
        if not wanting:
            return None
        forecasts = self.drafting.forecasts(drafted.slots)
        return next(((m, f) for m, f in forecasts if not wanting.isdisjoint(f.slots.tolist())), None)

    def _cut(self, steps: SequenceABC[PlannedStep], drafted: _Drafted) -> DraftTrees:
        """Choose the nodes of this round over all its sequences, and hold KV pages for them."""
        offers = self._offers(drafted)
        wanted = []
        for index, count in zip(drafted.indices, self._chosen(drafted, offers).tolist(), strict=True):
            if count:
                count = min(count, self._scheduler.tree_room(steps[index]))
                self._scheduler.take_tree_pages(steps[index], count)
            wanted.append(count)
        cut = self.drafting.trees.cut(drafted.slots, offers, np.array(wanted))
        return _spread(steps, drafted.indices, cut)

    def _chosen(self, drafted: _Drafted, offers: Offers) -> Ints:
        """[B]: how many offered nodes of each sequence pay; a row's offers descend, so they are its first ones."""
        is_offered = offers.values > 0.0
        most = self._options.max_round_tokens - drafted.num_base_rows
        if self._options.fixed_budget and np.count_nonzero(is_offered) <= most:
            return np.add.reduce(is_offered, axis=1, dtype=np.int64)
        owners = is_offered.nonzero()[0]
        values = offers.values[is_offered]
        order = (-values).argsort(kind="stable")[:most]
        if not self._options.fixed_budget:
            drafted_s = self._charged_s(drafted.begun, self._clock())
            count = self.cost.best_num_nodes(
                values[order], drafted.num_base_rows, drafted.num_sampling, drafted_s
            )
            order = order[:count]
        return np.bincount(owners[order], minlength=len(drafted.slots))


def _without_drafts(steps: SequenceABC[PlannedStep]) -> DraftTrees:
    counts = np.array([int(step.reaches_end) for step in steps], dtype=np.int64)
    roots = DraftTrees.roots(np.array([step.sequence.tokens[-1] for step in steps], dtype=np.int64))
    return DraftTrees(counts, roots.tokens, roots.parents, roots.growing_nodes)


def _spread(steps: SequenceABC[PlannedStep], indices: list[int], cut: DraftTrees) -> DraftTrees:
    """A row for every step, those at `indices` from `cut`."""
    if len(indices) == len(steps):
        return cut
    plain = _without_drafts(steps)
    shape = (len(steps), cut.tokens.shape[1])
    tokens, parents, nodes = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    tokens[:, :1] = plain.tokens
    counts = plain.counts.copy()
    counts[indices], tokens[indices], parents[indices] = cut.counts, cut.tokens, cut.parents
    nodes[indices] = cut.growing_nodes
    return DraftTrees(counts, tokens, parents, nodes)
