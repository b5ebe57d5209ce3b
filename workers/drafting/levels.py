"""What draft methods with a cache have in common: one forward per level, best first, under the noise of the target.

Each step runs the nodes whose continuations promise most through the method's model, with their KV rows written
behind the committed prefix of the drafter's own paged cache. Who derives from this says what a forward reads, and
which rows a verdict leaves.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.proposals import NUM_SAMPLED_KINDS, priors_and_kinds
from outrider.workers.drafting.acceptance import (
    AcceptanceEstimator,
    follow_errors,
)
from outrider.workers.drafting.frontier import Frontier, add_ancestors, with_ancestors
from outrider.workers.drafting.grown_levels import Level
from outrider.workers.drafting.laws import SlotLaws
from outrider.workers.drafting.method import NO_FURTHER_STEPS, DraftMethod, Following, Forecast
from outrider.workers.drafting.row_cache import Expansion, RowCache, chains
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.model.batch import TreeRows
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Prepared, Sampler
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Bools, DraftTrees, Floats, Ints, Window
from outrider.workers.timing import Stretches

ROWS_PER_STEP = 6  # nodes of one sequence that a step expands
MAX_LAG = 32  # tokens that are read on the way to drafting; more are read in chunks beforehand
MIN_GAIN = 0.01  # expected accepted tokens below which a node is not worth a row
_TRUE = np.ones(1, dtype=np.bool_)
_FIRST_YIELD = 0.5  # assumed of the best proposals before any was seen


@dataclass(frozen=True)
class LevelLimits:
    """How much a method of this kind does at once.

    Attributes:
        max_children: proposals below a node.
        rows_per_sequence, max_rows: nodes that a step expands, of one sequence and of all.
        prefill_chunk: tokens that `read` reads.
    """

    max_children: int
    rows_per_sequence: int
    max_rows: int
    prefill_chunk: int


class LevelMethod(DraftMethod):
    """Grows trees level by level. Without pages it just proposes nothing."""

    def __init__(
        self,
        slots: DraftedSlots,
        estimator: AcceptanceEstimator,
        rows: RowCache,
        sampler: Sampler,
        num_target_tokens: int,
        limits: LevelLimits,
        stretches: Stretches,
    ) -> None:
        """num_target_tokens: a padded vocabulary may have more ids than the target's."""
        super().__init__(slots, estimator)
        self._rows = rows
        self._sampler = sampler
        self._num_target_tokens = num_target_tokens
        self._limits = limits
        self._stretches = stretches
        self._laws = SlotLaws(slots)
        self._planned: tuple[tuple[int, bytes], Frontier] | None = None
        self._first_source = estimator.reserve(NUM_SAMPLED_KINDS)
        # By rank: how likely the proposal below a node is accepted, if the node is; of each law: for sampled
        # requests the noise chooses, and a rule may keep what another refuses.
        self._first_yields = _FIRST_YIELD / 4.0 ** np.arange(limits.max_children)
        self._yields = np.tile(self._first_yields, (slots.num_laws, 1))

    @abstractmethod
    def _read_known(self, rows: TreeRows) -> None:
        """One forward over known tokens, for their rows alone."""

    @abstractmethod
    def _logits(self, expansion: Expansion, others: SequenceABC[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One forward: float32 logits [M, V'] after each node; and `others`, tensors of the host, which come to the
        device in the same copy as what it reads. `self._stretches` begins in it."""

    @abstractmethod
    def _timed_logits(self, rows: TreeRows) -> Tensor:
        """One forward over rows of nothing: float32 logits after each."""

    def _num_readable(self, slots: Ints) -> Ints:
        """[B]: known tokens before the root that have no row, as far as they can be read now."""
        return self._rows.num_unread(slots)

    def _can_grow(self, slots: Ints) -> Bools:
        """[B], or what is broadcast to it: whether all is here that a forward over the root reads."""
        return _TRUE

    def _reachable(self, window: Window, gains: Floats, has_row: Bools) -> Floats:
        """[B, width]: what the next step gains by each node, given what each promises by itself."""
        return gains

    def _goals(self, places: Ints) -> tuple[Ints, Ints]:
        """[M]: of nodes that a step expands, the places of those that promise what they are expanded for, and in how
        many steps that is reached."""
        return places, np.ones_like(places)

    def start(self, sequence: Sequence) -> None:
        """Take the shared pages that hold the beginning of the prompt."""
        self._rows.start(sequence)
        self._laws.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Give the pages back."""
        self._rows.finish(sequence.slot)

    def unread(self, slots: Ints) -> Ints:
        """The tokens that these sequences' caches lack, where they are too many for a step to read them."""
        missing = self._num_readable(slots)
        return missing[missing >= MAX_LAG]

    @torch.inference_mode()
    def read(self, slots: Ints) -> int:
        """Read one chunk, shared between the sequences that lag far behind; returns its tokens."""
        missing = self._num_readable(slots)  # the root is left for drafting
        room, chosen, counts = self._limits.prefill_chunk, [], []
        for slot, lacking in zip(slots.tolist(), missing.tolist(), strict=True):
            count = min(lacking, room)
            if lacking >= MAX_LAG and count > 0 and self._rows.take_pages(slot, count):
                room -= count
                chosen.append(slot)
                counts.append(count)
        if chosen:
            read, lengths = np.array(chosen), np.array(counts)
            contexts = self._rows.context_lens[read]
            self._planned = None
            tokens = np.concatenate([self._rows.next_tokens(*of) for of in zip(chosen, counts, strict=True)])
            self._read_known(chains(read, contexts, lengths, tokens))
            self._stretches.end("forward", int(lengths.sum()))
            self._stretches.settle()
            self._rows.commit(read, lengths)
        return self._limits.prefill_chunk - room

    def forecast(self, slots: Ints) -> Forecast:
        """What the next step over these slots would do."""
        frontier = self._frontier(slots)
        return Forecast(
            lambda: self._gains(frontier), frontier.num_rows, frontier.slots, self._following(frontier)
        )

    def _following(self, frontier: Frontier) -> Following:
        """Steps that can follow without the host."""
        return NO_FURTHER_STEPS

    def _of_followed(self, frontier: Frontier) -> Frontier:
        """The part of it whose steps can be followed by others without the host; all of it where there is none."""
        return frontier

    def _grow_levels(self, expansion: Expansion, prepared: Prepared, num_further: int) -> int:
        """Takes the step, with what can follow without the host, at most `num_further` more; returns how many steps
        were taken, 0: the host has to take it."""
        return 0

    def root_gains(self, laws: Ints) -> Floats:
        """The gains of a step over roots, at least those assumed at first."""
        return np.maximum(self._yields, self._first_yields)[laws].ravel()

    def survival(self, slots: Ints, sent: DraftTrees) -> float:
        """Of the nodes that a step is for and that are not verified now, the best one's value, or its share."""
        goals, num_steps = self._goals(self._frontier(slots).places)
        is_sent = np.zeros(len(self.trees.flat.values), dtype=np.bool_)
        is_sent[((slots * self.trees.capacity)[:, None] + sent.growing_nodes)[sent.exists]] = True
        return float((self.trees.flat.values[goals] * ~is_sent[goals] / num_steps).max(initial=0.0))

    @torch.inference_mode()
    def time_step(self, num_rows: int) -> float:
        """Seconds of a step over one chain of greedy rows, all proposing."""
        pool = self._rows.pool
        pages = pool.allocate(min(pool.pages_for(num_rows), pool.num_available))
        num_rows = min(num_rows, len(pages) * pool.page_size)
        self._rows.tables.clear(0)
        self._rows.tables.append(0, pages)
        zero, length = np.zeros(1, dtype=np.int64), np.array([num_rows])
        rows = chains(zero, zero, length, np.zeros(num_rows, dtype=np.int64))
        sampled = SampledRows(SamplingParams(temperature=0.0), np.arange(num_rows), PenaltyState(()))
        begun = time.monotonic()
        self._sampler.propose(self._timed_logits(rows), [sampled], self._limits.max_children)
        seconds = time.monotonic() - begun
        self._rows.tables.clear(0)
        pool.release(pages)
        return seconds

    def expand(self, slots: Ints) -> bool:
        """Expand the most promising nodes of these trees in one forward."""
        return self.expand_levels(slots, 0) > 0

    @torch.inference_mode()
    def expand_levels(self, slots: Ints, num_further: int) -> int:
        """`expand`, and what can follow it without the host."""
        frontier = self._frontier(slots)
        if num_further:
            frontier = self._of_followed(frontier)
        frontier = self._within_room(frontier)
        if not len(frontier.nodes):
            return 0
        expansion = self._rows.plan(frontier)
        prepared = None
        # What takes long to prepare, texts that are looked through, waits until the device is busy.
        if not any(self._laws[slot][0].follows_text for slot in expansion.slots.tolist()):
            prepared = self._prepared(expansion)
            if num_steps := self._grow_levels(expansion, prepared, num_further):
                return num_steps
        logits, asked = self._logits(expansion, prepared.on_host if prepared else [])
        self._stretches.end("forward", len(expansion.rows.tokens))
        tokens, log_probs = self._sampler.propose_prepared(
            logits, prepared or self._prepared(expansion), self._limits.max_children, asked
        )
        self._stretches.end("sample", len(expansion.nodes))
        self._stretches.settle()
        self._rows.computed(expansion)
        self._planned = None  # also where the trees have all the proposals already
        self._propose(expansion, tokens.numpy(), log_probs.numpy())
        return 1

    def _frontier(self, slots: Ints) -> Frontier:
        """The nodes that the next step expands; for a few sequences more of each than for many.

        The gain of a node is what the model is expected to add to what other methods proposed there already.
        The end of a looked-up chain may promise most: then the chain above it comes along, in one forward.
        """
        key = (self.trees.version, slots.tobytes())
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, self._find_frontier(slots))
        return self._planned[1]

    def _find_frontier(self, slots: Ints) -> Frontier:
        trees, rows, window = self.trees, self._rows, self.trees.window(slots)
        most = self._rows_per_sequence(len(slots))
        # A node whose children do not fit would never get them: it is expanded once.
        limits = np.minimum(most, trees.room(slots) // self._limits.max_children)
        num_unread = rows.num_unread(slots)
        limits *= (num_unread < MAX_LAG) & self._can_grow(slots)
        has_row = rows.flat_has_row[window.places]
        # Padding has no value, so it promises nothing.
        promised = np.add.reduce(self._yields, axis=1)[self.slots.laws[slots]]
        gains = promised[:, None] - trees.flat.child_mass[window.places]
        gains *= trees.flat.values[window.places]
        gains *= trees.flat.depths[window.places] < self.slots.growth_depths(slots)[:, None]
        gains[has_row] = 0.0
        gains = self._reachable(window, gains, has_row)
        chosen = gains > MIN_GAIN
        counts = np.add.reduce(chosen, axis=1, dtype=np.int64)
        if np.count_nonzero(counts > limits):
            order = (-gains).argsort(axis=1, kind="stable")
            too_many = np.arange(window.width) >= limits[:, None]
            chosen[too_many.nonzero()[0], order[too_many]] = False
            counts = np.add.reduce(chosen, axis=1, dtype=np.int64)
        at = chosen.reshape(-1).nonzero()[0]
        starts = window.starts.repeat(counts)
        places = window.places.reshape(-1)[at]
        is_ready = (has_row | chosen).reshape(-1)[starts + trees.flat.parents[places]]
        if np.count_nonzero(is_ready) < len(is_ready):
            all_parents = trees.flat.parents[window.places]
            add_ancestors(all_parents, chosen, has_row)
            for row in np.flatnonzero(chosen.sum(axis=1) > limits).tolist():
                own = gains[row] * (gains[row] > MIN_GAIN)
                chosen[row] = with_ancestors(all_parents[row], own, has_row[row], int(limits[row]))
            counts = np.add.reduce(chosen, axis=1, dtype=np.int64)
            at = chosen.reshape(-1).nonzero()[0]
            starts, places = window.starts.repeat(counts), window.places.reshape(-1)[at]
        gains, nodes = gains.reshape(-1)[at], at - starts
        if np.count_nonzero(counts) < len(counts):
            grows = counts > 0
            slots, counts, num_unread = slots[grows], counts[grows], num_unread[grows]
        return Frontier(slots, counts, num_unread, slots.repeat(counts), nodes, places, gains)

    def _rows_per_sequence(self, num_sequences: int) -> int:
        """The most nodes of each that a step expands."""
        return max(1, min(self._limits.rows_per_sequence, self._limits.max_rows // max(1, num_sequences)))

    def _gains(self, frontier: Frontier) -> Floats:
        """[M], descending: expected accepted tokens of each proposal below nodes, less what is there already."""
        flat = self.trees.flat
        goals, num_steps = self._goals(frontier.places)
        counted = flat.depths[goals] < self.slots.max_depth[frontier.node_slots]
        slots, places = frontier.node_slots[counted], goals[counted]
        yields_so_far = self._yields.cumsum(axis=1)[self.slots.laws[slots]]
        # What is there already takes the place of the first proposals.
        left = np.maximum(yields_so_far - flat.child_mass[places][:, None], 0.0)
        left[:, 1:] -= left[:, :-1].copy()
        left *= (flat.values[places] / num_steps[counted])[:, None]
        return np.sort(left[left > 0.0])[::-1]

    def _within_room(self, frontier: Frontier) -> Frontier:
        """As many sequences as a step has rows for, those that gain most first, and pages."""
        slots, counts = frontier.slots, frontier.counts
        lacks_pages = self._rows.lacks_pages(slots, counts)
        if len(frontier.nodes) <= self._limits.max_rows and not np.count_nonzero(lacks_pages):
            return frontier
        owners = np.arange(len(slots)).repeat(counts)
        totals = np.bincount(owners, frontier.gains, minlength=len(slots))
        allowed, room = np.zeros(len(slots), dtype=np.bool_), self._limits.max_rows
        for index in np.argsort(-totals, kind="stable").tolist():
            count = int(counts[index])
            if count > room:
                continue
            if not lacks_pages[index] or self._rows.take_rows(int(slots[index]), count):
                room -= count
                allowed[index] = True
        return frontier.of(allowed, allowed[owners])

    def _prepared(self, expansion: Expansion) -> Prepared:
        return self._sampler.prepare(self._sampled_rows(expansion), num=self._limits.max_children)

    def _sampled_rows(self, expansion: Expansion) -> list[SampledRows]:
        positions = self.trees.root_positions[expansion.node_slots] + self.trees.flat.depths[expansion.places]
        positions += 1
        sampled, begin = [], 0
        for slot, end in zip(expansion.slots.tolist(), expansion.num_nodes.cumsum().tolist(), strict=True):
            params, penalties = self._laws[slot]
            paths: list[list[int]] = []
            if params.follows_text:
                paths = [self.trees.path(slot, node) for node in expansion.nodes[begin:end].tolist()]
            allowed = self.trees.words(slot, paths)
            sampled.append(SampledRows(params, positions[begin:end], penalties, paths, allowed))
            begin = end
        return sampled

    def _propose(self, expanded: Expansion | Level, tokens: Ints, log_probs: Floats) -> None:
        """Put proposals ([M, children], best first) below the nodes, and learn what proposals are worth."""
        slots, nodes = expanded.node_slots, expanded.nodes
        is_greedy = self.slots.is_greedy[slots]
        log_probs = log_probs.astype(np.float64)
        priors, kinds = priors_and_kinds(log_probs, is_greedy)
        kinds += self._first_source
        estimates = self.estimator.estimate(kinds, priors, self.slots.rules[slots][:, None])
        # A mask, top-k, top-p or min-p removed what has no probability: the target cannot pick it.
        met = log_probs > -np.inf
        possible = met & (tokens < self._num_target_tokens)
        promised = self.trees.flat.values[expanded.places]
        at = possible.nonzero()[0]
        values = np.zeros(tokens.shape)
        values[possible] = self.trees.add_children(
            slots[at], nodes[at], tokens[possible], estimates[possible], kinds[possible]
        )
        laws = self.slots.laws[slots]
        values -= promised[:, None] * self._yields[laws]
        values *= met
        follow_errors(self._yields, laws, values, met)
