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
from outrider.workers.sequences.vocabulary import VocabularyRange
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
            sampler=Sampler(vocab_size, VocabularyRange(0, vocab_size), solo, kernels),
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
        missing = self._rows.lags(slots) - 1
        return missing[missing >= _MAX_LAG]

    @torch.inference_mode()
    def read(self, slots: Ints) -> int:
        """Read one chunk, shared between the sequences that lag far behind; returns its tokens."""
        missing = self._rows.lags(slots) - 1  # the root is left for drafting
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
        if not len(frontier.nodes):
            return Forecast(np.zeros(0), 0, frontier.nodes)
        owner_slots = slots[frontier.owners]
        depths = self.trees.depths.reshape(-1)[owner_slots * self.trees.capacity + frontier.nodes]
        counted = depths < self.slots.max_depth[owner_slots]
        gains = self._gains(owner_slots[counted], frontier.nodes[counted]).ravel()
        gains = gains[gains > 0.0]
        gains.sort()
        grows = frontier.counts > 0
        num_rows = int(np.add.reduce(frontier.lags[grows])) + int(np.count_nonzero(frontier.nodes))
        return Forecast(gains[::-1], num_rows, slots[grows])

    def root_gains(self, is_greedy: Bools) -> Floats:
        """The gains of a step over roots, at least those assumed at first."""
        return np.maximum(self._yields, self._first_yields)[is_greedy.astype(np.int64)].ravel()

    def survival(self, slots: Ints, sent: DraftTrees) -> float:
        """Of the nodes that the next step expands and that are not verified now, the best one's value."""
        frontier = self._frontier(slots)
        is_sent = np.zeros((len(slots), max(1, self.trees.width(slots))), dtype=np.bool_)
        exists = sent.exists
        is_sent[np.nonzero(exists)[0], sent.growing_nodes[exists]] = True
        values = self.trees.values[slots[frontier.owners], frontier.nodes]
        return float(values[~is_sent[frontier.owners, frontier.nodes]].max(initial=0.0))

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
        grows = frontier.counts > 0
        expansion = self._rows.plan(slots[grows], frontier.counts[grows], frontier.nodes)
        hidden = self._forward(expansion.rows)
        logits = self._model.logits_of(hidden, expansion.node_rows)
        self._stretches.end("forward", len(expansion.rows.tokens))
        tokens, log_probs = self._sampler.propose(logits, self._sampled_rows(expansion), self._max_children)
        self._stretches.end("sample", len(expansion.nodes))
        self._stretches.settle()
        self._rows.computed(expansion)
        self._planned = None  # also where the trees have all the proposals already
        self._propose(expansion.node_slots, expansion.nodes, tokens.numpy(), log_probs.numpy())
        return True

    def rerooted(self, survivors: Survivors) -> None:
        """Keep the rows of the paths that came out and of the survivors below them."""
        sources, targets = self._rows.reroot(survivors)
        if len(sources):
            device = self._model.device
            self._cache.commit(torch.from_numpy(sources).to(device), torch.from_numpy(targets).to(device))
        lengths = np.add.reduce(survivors.paths, axis=1, dtype=np.int64)
        for slot, length in zip(survivors.slots.tolist(), lengths.tolist(), strict=True):
            params, penalties = self._laws[slot]
            if params.uses_context:
                for token in self.slots.sequence(slot).tokens[-length:]:
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
        if not len(slots):
            return Frontier(slots, slots, slots, slots, slots, np.zeros(0))
        trees = self.trees
        most = max(1, min(self._rows_per_sequence, self._max_rows // len(slots)))
        # A node whose children do not fit would never get them: it is expanded once.
        limits = np.minimum(most, trees.room(slots) // self._max_children)
        lags = self._rows.lags(slots)
        limits *= lags <= _MAX_LAG
        width = trees.width(slots)
        has_row = self._rows.has_row[slots, :width]
        # Padding has no value, so it promises nothing.
        promised = np.add.reduce(self._yields, axis=1)[self.slots.is_greedy[slots].view(np.int8)]
        gains = promised[:, None] - trees.child_mass[slots, :width]
        gains *= trees.values[slots, :width]
        gains *= trees.depths[slots, :width] < self.slots.growth_depths(slots)[:, None]
        gains *= ~has_row
        chosen = gains > _MIN_GAIN
        counts = np.add.reduce(chosen, axis=1, dtype=np.int64)
        if np.count_nonzero(counts > limits):
            order = (-gains).argsort(axis=1, kind="stable")
            too_many = np.arange(width) >= limits[:, None]
            chosen[too_many.nonzero()[0], order[too_many]] = False
            counts = np.add.reduce(chosen, axis=1, dtype=np.int64)
        owners, nodes = chosen.nonzero()
        parents = trees.parents.reshape(-1)[slots[owners] * trees.capacity + nodes]
        is_ready = (has_row | chosen)[owners, parents]
        if np.count_nonzero(is_ready) < len(is_ready):
            all_parents = trees.parents[slots, :width]
            add_ancestors(all_parents, chosen, has_row)
            for row in np.flatnonzero(chosen.sum(axis=1) > limits).tolist():
                own = gains[row] * (gains[row] > _MIN_GAIN)
                chosen[row] = with_ancestors(all_parents[row], own, has_row[row], int(limits[row]))
            counts = np.add.reduce(chosen, axis=1, dtype=np.int64)
            owners, nodes = chosen.nonzero()
        return Frontier(slots, lags, counts, owners, nodes, gains[owners, nodes])

    def _gains(self, slots: Ints, nodes: Ints) -> Floats:
        """[M, children] by rank: expected accepted tokens of proposals below nodes, less what is there."""
        here = slots * self.trees.capacity + nodes
        values, proposed = self.trees.values.reshape(-1)[here], self.trees.child_mass.reshape(-1)[here]
        yields_so_far = self._yields.cumsum(axis=1)[self.slots.is_greedy[slots].view(np.int8)]
        # What is there already takes the place of the first proposals.
        left = np.maximum(yields_so_far - proposed[:, None], 0.0)
        left[:, 1:] -= left[:, :-1].copy()
        return values[:, None] * left

    def _within_room(self, frontier: Frontier) -> Frontier:
        """As many sequences as a step has rows for, those that gain most first, and pages."""
        if not len(frontier.nodes):
            return frontier
        counts = frontier.counts
        lacks_pages = self._rows.lacks_pages(frontier.slots, counts)
        if len(frontier.nodes) <= self._max_rows and not np.count_nonzero(lacks_pages):
            return frontier
        totals = np.bincount(frontier.owners, frontier.gains, minlength=len(frontier.slots))
        allowed, room = np.zeros(len(frontier.slots), dtype=np.bool_), self._max_rows
        for index in np.argsort(-totals, kind="stable").tolist():
            count = int(counts[index])
            if not 0 < count <= room:
                continue
            if not lacks_pages[index] or self._rows.take_rows(int(frontier.slots[index]), count):
                room -= count
                allowed[index] = True
        kept = allowed[frontier.owners]
        return Frontier(
            frontier.slots,
            frontier.lags,
            counts * allowed,
            frontier.owners[kept],
            frontier.nodes[kept],
            frontier.gains[kept],
        )

    def _forward(self, rows: TreeRows) -> torch.Tensor:
        """[num_rows, hidden], valid until the next call. Its stretch of time begins here; the caller ends it."""
        batch = build_batch(self._rows.tables, rows, self._model.device)
        self._stretches.begin()
        return self._run(batch).last

    def _sampled_rows(self, expansion: Expansion) -> list[SampledRows]:
        positions = self.trees.root_positions[expansion.node_slots] + 1
        positions += self.trees.depths.reshape(-1)[expansion.places]
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

    def _propose(self, slots: Ints, nodes: Ints, tokens: Ints, log_probs: Floats) -> None:
        """Put proposals ([M, children], best first) below nodes ([M]), and learn what proposals are worth."""
        is_greedy = self.slots.is_greedy[slots]
        log_probs = log_probs.astype(np.float64)
        priors, kinds = priors_and_kinds(log_probs, is_greedy)
        kinds += self._first_source
        # Top-k, top-p or min-p removed what has no probability: the target cannot pick it.
        met = log_probs > -np.inf
        possible = met & (tokens < self._num_target_tokens)
        promised = self.trees.values.reshape(-1)[slots * self.trees.capacity + nodes]
        at, sources = possible.nonzero()[0], kinds[possible]
        values = np.zeros(tokens.shape)
        values[possible] = self.trees.add_children(
            slots[at],
            nodes[at],
            tokens[possible],
            self.estimator.estimate(sources, priors[possible]),
            sources,
        )
        laws = is_greedy.view(np.int8)
        values -= promised[:, None] * self._yields[laws]
        values *= met
        follow_errors(self._yields, laws, values, met)
