"""Draft method `model`: a small language model grows the tree best first, under the noise of the target.

Each step runs the nodes whose continuations promise most through the model, with their KV rows written behind
the committed prefix of the drafter's own paged cache. A verdict keeps the rows of the path that came out and
of everything that survives below it (SwiftSpec, arXiv 2506.11309).
"""

from __future__ import annotations

import time

import numpy as np
import torch

from outrider.workers.drafting.acceptance import (
    NUM_SAMPLED_KINDS,
    AcceptanceEstimator,
    follow_errors,
    priors_and_kinds,
)
from outrider.workers.drafting.frontier import Frontier, add_ancestors, with_ancestors
from outrider.workers.drafting.method import DraftMethod, Forecast, MethodContext
from outrider.workers.drafting.row_cache import Expansion, RowCache, chains
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.batch import TreeRows, build_batch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import draft_capacities, forward_of
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Bools, DraftTrees, Floats, Ints, Survivors
from outrider.workers.setup import counting, kernels_for, load_model, num_draft_pages, torch_dtype
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer

_ROWS_PER_STEP = 6  # nodes of one sequence that a step expands
_MAX_LAG = 32  # tokens the model reads on the way to drafting; more are read in chunks beforehand
_MIN_GAIN = 0.01  # expected accepted tokens below which a node is not worth a row
_FIRST_YIELD = 0.5  # assumed of the best proposals before any was seen


class ModelMethod(DraftMethod):
    """Grows trees with a draft model. Without pages it just proposes nothing."""

    name = "model"

    def __init__(
        self,
        slots: DraftedSlots,
        estimator: AcceptanceEstimator,
        model: Transformer,
        cache: PagedCache,
        pool: PagePool,
        sampler: Sampler,
        num_target_tokens: int,
        max_children: int,
        rows_per_sequence: int,
        max_rows: int,
        prefill_chunk: int,
        tracer: Tracer,
    ) -> None:
        """num_target_tokens: a padded vocabulary may have more ids than the target's; max_rows: of a step's nodes."""
        super().__init__(slots, estimator)
        self._model = model
        self._run = forward_of(model, cache, draft_capacities(model, cache))
        self._stretches = Stretches(model.device, tracer)
        self._cache = cache
        self._rows = RowCache(slots, pool)
        self._sampler = sampler
        self._num_target_tokens = num_target_tokens
        self._max_children = max_children
        self._rows_per_sequence = rows_per_sequence
        self._max_rows = max_rows
        self._prefill_chunk = prefill_chunk
        # By slot, what the law of its rows depends on besides the logits.
        self._laws = [(SamplingParams(), PenaltyState(()))] * len(slots)
        self._planned: tuple[tuple[int, bytes], Frontier] | None = None
        self._first_source = estimator.reserve(NUM_SAMPLED_KINDS)
        # By rank: how likely the proposal below a node is accepted, if the node is; of sampled and greedy requests,
        # because for sampled ones the noise chooses.
        self._first_yields = _FIRST_YIELD / 4.0 ** np.arange(max_children)
        self._yields = np.stack([self._first_yields, self._first_yields])

    @classmethod
    def build(cls, context: MethodContext) -> ModelMethod:
        """Load `draft.model` and lay out its cache."""
        config, progress = context.config, context.progress
        draft, rounds = config.draft, config.rounds
        device, dtype = context.device, torch_dtype(draft.dtype)
        source = load_model(config, "draft", progress)
        plan = ShardPlan(source.config, 0, 1)
        counted = counting(progress, source.total_bytes(dtype))
        kernels = kernels_for(config, source.config, device, dtype)
        solo = SoloCommunicator()
        weights = load_weights(plan, source, dtype, device, draft.packed_weights, counted)
        model = Transformer(weights, solo, kernels)
        page_size = config.target.page_size
        num_pages = num_draft_pages(config, source.config)
        vocab_size = source.config.vocab_size
        return cls(
            slots=context.slots,
            estimator=context.estimator,
            model=model,
            cache=PagedCache(source.config, plan, num_pages, page_size, dtype, device, kernels.kv_commit),
            pool=PagePool(num_pages, page_size, rounds.prefix_sharing),
            sampler=Sampler(vocab_size, range(vocab_size), solo, kernels),
            num_target_tokens=context.target.vocab_size,
            max_children=config.tree.max_children,
            rows_per_sequence=_ROWS_PER_STEP,
            max_rows=max(_ROWS_PER_STEP, rounds.max_sequences),
            prefill_chunk=rounds.prefill_chunk,
            tracer=context.tracer,
        )

    def start(self, sequence: Sequence) -> None:
        """Take the shared pages that hold the beginning of the prompt."""
        self._rows.start(sequence)
        params, penalties = sequence.request.sampling, PenaltyState(())
        if params.uses_context:
            penalties = PenaltyState(sequence.request.prompt_tokens)
            for token in sequence.tokens[len(sequence.request.prompt_tokens) :]:
                penalties.add(token)
        self._laws[sequence.slot] = params, penalties

    def finish(self, sequence: Sequence) -> None:
        """Give the pages back."""
        self._rows.finish(sequence.slot)

    def unread(self, slots: Ints) -> Ints:
        """The tokens that these sequences' caches lack, where they are too many for a step to read them."""
        missing = self._rows.num_unread(slots)
        return missing[missing >= _MAX_LAG]

    @torch.inference_mode()
    def read(self, slots: Ints) -> int:
        """Read one chunk, shared between the sequences that lag far behind; returns its tokens."""
        missing = self._rows.num_unread(slots)  # the root is left for drafting
        room, chosen, counts = self._prefill_chunk, [], []
        for slot, lacking in zip(slots.tolist(), missing.tolist(), strict=True):
            count = min(lacking, room)
            if lacking >= _MAX_LAG and count > 0 and self._rows.take_pages(slot, count):
                room -= count
                chosen.append(slot)
                counts.append(count)
        if chosen:
            read, lengths = np.array(chosen), np.array(counts)
            contexts = self._rows.context_lens[read]
            tokens = [
                self.slots.sequence(slot).tokens[begin : begin + count]
                for slot, begin, count in zip(chosen, contexts.tolist(), counts, strict=True)
            ]
            self._planned = None
            self._forward(chains(read, contexts, lengths, np.concatenate(tokens)))
            self._stretches.end("forward", int(lengths.sum()))
            self._stretches.settle()
            self._rows.commit(read, lengths)
        return self._prefill_chunk - room

    def forecast(self, slots: Ints) -> Forecast:
        """What the next step over these slots would do."""
        frontier = self._frontier(slots)
        return Forecast(lambda: self._gains(frontier), frontier.num_rows, frontier.slots)

    def root_gains(self, is_greedy: Bools) -> Floats:
        """The gains of a step over roots, at least those assumed at first."""
        return np.maximum(self._yields, self._first_yields)[is_greedy.astype(np.int64)].ravel()

    def survival(self, slots: Ints, sent: DraftTrees) -> float:
        """Of the nodes that the next step expands and that are not verified now, the best one's value."""
        frontier = self._frontier(slots)
        is_sent = np.zeros(len(self.trees.flat.values), dtype=np.bool_)
        is_sent[((slots * self.trees.capacity)[:, None] + sent.growing_nodes)[sent.exists]] = True
        ahead = frontier.places[~is_sent[frontier.places]]
        return float(self.trees.flat.values[ahead].max(initial=0.0))

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
        hidden = self._run(build_batch(self._rows.tables, rows, self._model.device)).last
        self._sampler.propose(self._model.logits(hidden), [sampled], self._max_children)
        seconds = time.monotonic() - begun
        self._rows.tables.clear(0)
        pool.release(pages)
        return seconds

    @torch.inference_mode()
    def expand(self, slots: Ints) -> bool:
        """Expand the most promising nodes of these trees in one forward."""
        frontier = self._within_room(self._frontier(slots))
        if not len(frontier.nodes):
            return False
        expansion = self._rows.plan(frontier.slots, frontier.counts, frontier.nodes)
        hidden = self._forward(expansion.rows)
        logits = self._model.logits_of(hidden, expansion.node_rows)
        self._stretches.end("forward", len(expansion.rows.tokens))
        tokens, log_probs = self._sampler.propose(logits, self._sampled_rows(expansion), self._max_children)
        self._stretches.end("sample", len(expansion.nodes))
        self._stretches.settle()
        self._rows.computed(expansion)
        self._planned = None  # also where the trees have all the proposals already
        self._propose(expansion, tokens.numpy(), log_probs.numpy())
        return True

    def rerooted(self, survivors: Survivors) -> None:
        """Keep the rows of the paths that came out and of the survivors below them."""
        sources, targets = self._rows.reroot(survivors)
        if len(sources):
            device = self._model.device
            self._cache.commit(torch.from_numpy(sources).to(device), torch.from_numpy(targets).to(device))
        for slot, path in zip(survivors.slots.tolist(), survivors.paths, strict=True):
            params, penalties = self._laws[slot]
            if params.uses_context:
                for token in self.slots.sequence(slot).tokens[-np.count_nonzero(path) :]:
                    penalties.add(token)

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
        most = max(1, min(self._rows_per_sequence, self._max_rows // max(1, len(slots))))
        # A node whose children do not fit would never get them: it is expanded once.
        limits = np.minimum(most, trees.room(slots) // self._max_children)
        num_unread = rows.num_unread(slots)
        limits *= num_unread < _MAX_LAG
        has_row = rows.flat_has_row[window.places]
        # Padding has no value, so it promises nothing.
        promised = np.add.reduce(self._yields, axis=1)[self.slots.is_greedy[slots].view(np.int8)]
        gains = promised[:, None] - trees.flat.child_mass[window.places]
        gains *= trees.flat.values[window.places]
        gains *= trees.flat.depths[window.places] < self.slots.growth_depths(slots)[:, None]
        gains[has_row] = 0.0
        chosen = gains > _MIN_GAIN
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
                own = gains[row] * (gains[row] > _MIN_GAIN)
                chosen[row] = with_ancestors(all_parents[row], own, has_row[row], int(limits[row]))
            counts = np.add.reduce(chosen, axis=1, dtype=np.int64)
            at = chosen.reshape(-1).nonzero()[0]
            starts, places = window.starts.repeat(counts), window.places.reshape(-1)[at]
        gains, nodes = gains.reshape(-1)[at], at - starts
        if np.count_nonzero(counts) < len(counts):
            grows = counts > 0
            slots, counts, num_unread = slots[grows], counts[grows], num_unread[grows]
        return Frontier(slots, counts, num_unread, slots.repeat(counts), nodes, places, gains)

    def _gains(self, frontier: Frontier) -> Floats:
        """[M], descending: expected accepted tokens of each proposal below nodes, less what is there already."""
        flat = self.trees.flat
        counted = flat.depths[frontier.places] < self.slots.max_depth[frontier.node_slots]
        slots, places = frontier.node_slots[counted], frontier.places[counted]
        yields_so_far = self._yields.cumsum(axis=1)[self.slots.is_greedy[slots].view(np.int8)]
        # What is there already takes the place of the first proposals.
        left = np.maximum(yields_so_far - flat.child_mass[places][:, None], 0.0)
        left[:, 1:] -= left[:, :-1].copy()
        left *= flat.values[places][:, None]
        return np.sort(left[left > 0.0])[::-1]

    def _within_room(self, frontier: Frontier) -> Frontier:
        """As many sequences as a step has rows for, those that gain most first, and pages."""
        slots, counts = frontier.slots, frontier.counts
        lacks_pages = self._rows.lacks_pages(slots, counts)
        if len(frontier.nodes) <= self._max_rows and not np.count_nonzero(lacks_pages):
            return frontier
        owners = np.arange(len(slots)).repeat(counts)
        totals = np.bincount(owners, frontier.gains, minlength=len(slots))
        allowed, room = np.zeros(len(slots), dtype=np.bool_), self._max_rows
        for index in np.argsort(-totals, kind="stable").tolist():
            count = int(counts[index])
            if count > room:
                continue
            if not lacks_pages[index] or self._rows.take_rows(int(slots[index]), count):
                room -= count
                allowed[index] = True
        return frontier.of(allowed, allowed[owners])

    def _forward(self, rows: TreeRows) -> torch.Tensor:
        """[num_rows, hidden], valid until the next call. Its stretch of time begins here; the caller ends it."""
        batch = build_batch(self._rows.tables, rows, self._model.device)
        self._stretches.begin()
        return self._run(batch).last

    def _sampled_rows(self, expansion: Expansion) -> list[SampledRows]:
        positions = self.trees.root_positions[expansion.node_slots] + self.trees.flat.depths[expansion.places]
        positions += 1
        sampled, begin = [], 0
        for slot, end in zip(expansion.slots.tolist(), expansion.num_nodes.cumsum().tolist(), strict=True):
            params, penalties = self._laws[slot]
            paths: list[list[int]] = []
            if params.uses_context:
                paths = [self._path(slot, node) for node in expansion.nodes[begin:end].tolist()]
            sampled.append(SampledRows(params, positions[begin:end], penalties, paths))
            begin = end
        return sampled

    def _path(self, slot: int, node: int) -> list[int]:
        tokens = []
        while node:
            tokens.append(int(self.trees.tokens[slot, node]))
            node = int(self.trees.parents[slot, node])
        return tokens[::-1]

    def _propose(self, expansion: Expansion, tokens: Ints, log_probs: Floats) -> None:
        """Put proposals ([M, children], best first) below the nodes, and learn what proposals are worth."""
        slots, nodes = expansion.node_slots, expansion.nodes
        is_greedy = self.slots.is_greedy[slots]
        log_probs = log_probs.astype(np.float64)
        priors, kinds = priors_and_kinds(log_probs, is_greedy)
        kinds += self._first_source
        estimates = self.estimator.estimate(kinds, priors)
        # Top-k, top-p or min-p removed what has no probability: the target cannot pick it.
        met = log_probs > -np.inf
        possible = met & (tokens < self._num_target_tokens)
        promised = self.trees.flat.values[expansion.places]
        at = possible.nonzero()[0]
        values = np.zeros(tokens.shape)
        values[possible] = self.trees.add_children(
            slots[at], nodes[at], tokens[possible], estimates[possible], kinds[possible]
        )
        laws = is_greedy.view(np.int8)
        values -= promised[:, None] * self._yields[laws]
        values *= met
        follow_errors(self._yields, laws, values, met)
