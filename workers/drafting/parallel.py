"""Draft method `parallel` (DFlash, DSpark, JetSpec, DFlash2): one forward over a block guesses all levels of a tree.

The drafter's cache holds rows of known tokens alone, made of what the target said of them; the rows of a block are
written behind them, and over again by the next one. A verdict brings features and with them another block, so that
between two verdicts there is one forward to make. Candidates of a level are ranked under the noise of the target at
the level's own position. With a pair term a node's candidates depend on its token; without one all nodes of a level
have the same, as in JetSpec (arXiv 2606.18394, appendix A.4).
"""

from __future__ import annotations

import time
from typing import Self

import numpy as np
import torch
from torch import Tensor

from outrider.configs.schema import Config
from outrider.workers.capacity import num_draft_pages
from outrider.workers.draft_heads.checkpoint import read_parallel
from outrider.workers.draft_heads.layouts.parallel import read_parallel_config
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.features import FeatureStore
from outrider.workers.drafting.heads import check_fingerprint, check_target, read_for
from outrider.workers.drafting.laws import SlotLaws
from outrider.workers.drafting.levels import MAX_LAG, LevelLimits
from outrider.workers.drafting.medusa_tree import best_trees
from outrider.workers.drafting.method import DraftMethod, Forecast, MethodContext, Verified
from outrider.workers.drafting.row_cache import RowCache
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.drafting.spread import NUM_CERTAINTIES, Asked, Spreads, certainty_of, perturbed
from outrider.workers.drafting.yields import TreeYields
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.draft_heads import for_serving, vocabulary_of
from outrider.workers.model.embedding import embedding_of
from outrider.workers.model.parallel_drafter import CachedParallelDrafter
from outrider.workers.model.shard import ShardPlan
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Floats, Ints, Survivors
from outrider.workers.setup import kernels_for, load_target_tensors, torch_dtype
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fields import read_json
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import resolve_head
from outrider.workers.weights.source import head_name
from outrider.workers.weights.tensors import EMBEDDING, HEAD

_FIELD = "draft.parallel.model"
_NODES_PER_LEVEL = 6  # of one sequence, that get children
_MAX_LOGIT_ROWS = 256  # of a step: those of a vocabulary of 128k take 131 MB
_LEAST_VALUE = 0.01  # expected accepted tokens below which a node gets no children
_FIRST_YIELD = 0.4  # assumed of a level's best guess before any was seen


class ParallelMethod(DraftMethod):
    """Proposes a tree after every verdict. Without pages it just proposes nothing."""

    name = "parallel"
    is_trained = True

    def __init__(
        self,
        slots: DraftedSlots,
        estimator: AcceptanceEstimator,
        drafter: CachedParallelDrafter,
        pool: PagePool,
        sampler: Sampler,
        limits: LevelLimits,
        num_nodes: int,
        tracer: Tracer,
    ) -> None:
        """
        Args:
            pool: of the drafter's cache; sampler: over the ids of its LM head.
            num_nodes: of a tree, at most.
        """
        super().__init__(slots, estimator)
        shape = drafter.shape
        self.needs = HiddenNeeds(shape.taps, of_context=True)
        self._drafter, self._shape = drafter, shape
        self._rows = RowCache(slots, pool, window=drafter.model.widest_window)
        # More features than the cache has rows could never all be read.
        self._features = FeatureStore(len(slots), pool.num_pages * pool.page_size)
        self._sampler = sampler
        self._limits = limits
        self._num_nodes = num_nodes
        self._max_sequences = max(1, min(limits.max_rows, _MAX_LOGIT_ROWS // shape.num_levels))
        self._laws = SlotLaws(slots)
        self._stretches = Stretches(drafter.device, tracer)
        # Known tokens behind which the last block stood: there is nothing to propose before there are others.
        self._drafted_at = np.zeros(len(slots), dtype=np.int64)
        self._first_source = estimator.reserve(shape.num_levels * NUM_CERTAINTIES)
        self._spreads = Spreads(slots.num_laws, shape.num_levels)
        self._asked: list[list[Asked]] = [[] for _ in range(len(slots))]  # about the tree of each slot
        first = _FIRST_YIELD * 4.0 ** -np.arange(limits.max_children)
        values = best_trees(np.tile(first, (1, shape.num_levels, 1)), num_nodes).values[0, 1:]
        first_yields = np.zeros(num_nodes)
        first_yields[: len(values)] = values
        self._yields = TreeYields(first_yields, slots.num_laws)

    @classmethod
    def build(cls, context: MethodContext) -> Self:
        """Load `draft.parallel.model` and what it shares with the target, and lay out its cache."""
        config, target, device = context.config, context.target, context.device
        folder = resolve_head(config.draft.parallel.model, context.progress, _FIELD)
        drafter, description = read_for(_FIELD, lambda: read_parallel(folder))
        shape = drafter.shape
        check_target(_FIELD, description, shape.target_hidden_size, shape.vocab_size, target)
        check_target(_FIELD, description, shape.hidden_size, shape.vocab_size, target)
        _check_taps(shape.taps, target)
        shared = [EMBEDDING, *([HEAD] if drafter.shares_lm_head else [])]
        source = load_target_tensors(config, shared, context.progress)
        check_fingerprint(_FIELD, description, source)
        if drafter.shares_lm_head:
            drafter.take_target(source.read_rows(head_name(source), drafter.lm_head.ids, torch.float32))
        dtype, page_size = torch_dtype(config.draft.dtype), config.target.page_size
        layout = config.draft.packed_weights, config.draft.int8_heads
        served = for_serving(drafter, shape.vocab_size, dtype, device, *layout)
        vocabulary = vocabulary_of(served.lm_head.ids, shape.vocab_size)
        own = shape.model
        num_pages = num_draft_pages(config, own)
        kernels = kernels_for(config, own, device, dtype)
        cache = PagedCache(own, ShardPlan(own, 0, 1), num_pages, page_size, dtype, device, kernels.kv_commit)
        rounds, tree = config.rounds, config.tree
        return cls(
            slots=context.slots,
            estimator=context.estimator,
            drafter=CachedParallelDrafter(served, embedding_of(source, dtype, device), cache, kernels),
            pool=PagePool(num_pages, page_size, rounds.prefix_sharing),
            sampler=Sampler(len(vocabulary), vocabulary, SoloCommunicator(), kernels),
            limits=LevelLimits(
                max_children=min(tree.max_children, len(vocabulary)),
                rows_per_sequence=_NODES_PER_LEVEL,
                max_rows=max(_NODES_PER_LEVEL, rounds.max_sequences),
                prefill_chunk=rounds.prefill_chunk,
            ),
            num_nodes=max(1, tree.max_nodes),
            tracer=context.tracer,
        )

    @classmethod
    def needs_of(cls, config: Config, target: ModelConfig) -> HiddenNeeds:
        """The taps that the checkpoint names; its weights are not looked at."""
        folder = resolve_head(config.draft.parallel.model, silent, _FIELD, description_only=True)
        taps = read_for(_FIELD, lambda: read_parallel_config(read_json(folder / "config.json")).shape.taps)
        _check_taps(taps, target)
        return HiddenNeeds(taps, of_context=True)

    def prefix_kept(self, sequence: Sequence) -> int:
        """Context rows in shared pages: each was made of the feature at its own index, not needed again."""
        return self._rows.num_shared(sequence)

    def start(self, sequence: Sequence) -> None:
        """Take the shared pages; features come from where the target begins to read."""
        self._rows.start(sequence)
        self._laws.start(sequence)
        slot = sequence.slot
        self._features.start(slot, int(self._rows.context_lens[slot]), sequence.num_committed)
        self._drafted_at[slot] = 0
        self._asked[slot].clear()

    def finish(self, sequence: Sequence) -> None:
        """Give pages and features back."""
        self._rows.finish(sequence.slot)
        self._features.finish(sequence.slot)

    @torch.inference_mode()
    def observe(self, verified: Verified) -> None:
        """Keep the features of the tokens that the target has rows of now, and learn from what came out."""
        for step in verified.steps:
            slot = step.sequence.slot
            came_out = step.sequence.tokens[int(self.trees.root_positions[slot]) + 1 :]
            for asked in self._asked[slot] if len(step.growing_nodes) else ():
                if (which := asked.outcome(came_out)) >= 0:
                    self._spreads.learn(asked, which)
        self._features.keep(verified, self.needs.layers, self._drafter.features, self._shape.hidden_size)

    def rerooted(self, survivors: Survivors) -> None:
        """Penalties follow the text; no row is of a tree."""
        self._laws.rerooted(survivors)
        for slot in survivors.slots.tolist():
            self._asked[slot].clear()

    def unread(self, slots: Ints) -> Ints:
        """The context rows that these sequences lack, where they are too many for a step to write them."""
        missing = self._num_readable(slots)
        return missing[missing >= MAX_LAG]

    @torch.inference_mode()
    def read(self, slots: Ints) -> int:
        """Write a chunk of context rows, shared between the sequences that lag far behind; returns its tokens."""
        room, chosen, counts = self._limits.prefill_chunk, [], []
        for slot, lacking in zip(slots.tolist(), self._num_readable(slots).tolist(), strict=True):
            count = min(lacking, room)
            if lacking >= MAX_LAG and count > 0 and self._rows.take_pages(slot, count):
                room -= count
                chosen.append(slot)
                counts.append(count)
        if chosen:
            self._stretches.begin()
            self._write_context(np.array(chosen), np.array(counts))
            self._stretches.end("forward", sum(counts))
            self._stretches.settle()
        return self._limits.prefill_chunk - room

    def forecast(self, slots: Ints) -> Forecast:
        """A block for each sequence with news."""
        ready = self._ready(slots)
        return Forecast(
            lambda: self._yields.gains(self.trees, ready, self.slots.laws[ready]), len(ready), ready
        )

    def root_gains(self, laws: Ints) -> Floats:
        """What trees were worth so far, at least what is assumed at first."""
        return self._yields.root_gains(laws)

    @torch.inference_mode()
    def time_step(self, num_rows: int) -> float:
        """Seconds of a step over so many greedy sequences without context, each a chain of the best guesses."""
        pool, size = self._rows.pool, self._shape.block_size
        per_block = pool.pages_for(size)
        num = min(num_rows, self._max_sequences, len(self.slots), pool.num_available // per_block)
        if not num:
            return 0.0
        slots, contexts = np.arange(num), np.zeros(num, dtype=np.int64)
        pages = pool.allocate(num * per_block)
        for slot in range(num):
            self._rows.tables.clear(slot)
            self._rows.tables.append(slot, pages[slot * per_block : (slot + 1) * per_block])
        begun = time.monotonic()
        output, logits = self._block(slots, contexts, np.full(num, self._shape.mask_token_id))
        previous = np.full(num, self._shape.mask_token_id)
        for level in range(self._shape.num_levels):
            rows, _ = self._drafter.after(logits[:, level], output[:, level], previous)
            greedy = SampledRows(SamplingParams(temperature=0.0), np.arange(num), PenaltyState(()))
            tokens, _ = self._sampler.propose(rows, [greedy], self._limits.max_children)
            previous = tokens[:, 0].numpy()
        seconds = time.monotonic() - begun
        for slot in range(num):
            self._rows.tables.clear(slot)
        pool.release(pages)
        return seconds

    @torch.inference_mode()
    def expand(self, slots: Ints) -> bool:
        """Propose trees for the sequences about which there is news."""
        ready = self._ready(slots)
        lacking = self._rows.num_unread(ready)
        size = self._shape.block_size
        lags = zip(ready.tolist(), lacking.tolist(), strict=True)
        has_pages = np.array([self._rows.take_pages(slot, lag + size) for slot, lag in lags], dtype=np.bool_)
        ready, lacking = ready[has_pages], lacking[has_pages]
        if not len(ready):
            return False
        self._stretches.begin()
        self._write_context(ready, lacking)
        output, logits = self._block(ready, self._rows.context_lens[ready], self.trees.tokens[ready, 0])
        self._stretches.end("forward", len(ready) * size + int(lacking.sum()))
        self._drafted_at[ready] = self.slots.num_tokens[ready]
        num_rows = self._propose(ready, output, logits)
        self._stretches.end("sample", num_rows)
        self._stretches.settle()
        return True

    def _num_readable(self, slots: Ints) -> Ints:
        here = self._features.ends[slots] - self._rows.context_lens[slots]
        here *= ~self._features.is_lost[slots]
        return np.minimum(self._rows.num_unread(slots), here)

    def _ready(self, slots: Ints) -> Ints:
        """Sequences with news for which a step has room; the others' turn comes with the next one."""
        num_tokens = self.slots.num_tokens[slots]
        ready = (self.trees.room(slots) > 0) & (self.slots.round_depths(slots) > 0)
        ready &= (self._drafted_at[slots] != num_tokens) & self._features.have_all(slots, num_tokens)
        ready &= self._rows.num_unread(slots) < MAX_LAG
        # Beyond what its positions are meant for a drafter is hardly ever right.
        ready &= num_tokens + self._shape.block_size <= self._shape.max_context
        return slots[ready][: self._max_sequences]

    def _write_context(self, slots: Ints, counts: Ints) -> None:
        """The next rows of known tokens, whose pages are held."""
        if not np.count_nonzero(counts):
            return
        firsts = self._rows.context_lens[slots].copy()
        lags = zip(slots.tolist(), counts.tolist(), strict=True)
        features = torch.cat([self._features.next(slot, count) for slot, count in lags if count])
        self._drafter.write_context(self._rows.tables, slots, firsts, counts, features)
        self._rows.commit(slots, counts)
        self._features.drop_read(slots, firsts + counts)

    def _block(self, slots: Ints, contexts: Ints, anchors: Ints) -> tuple[Tensor, Tensor]:
        """Of each level the row [S, K, hidden] and its logits [S, K, V'], without the pair term."""
        output = self._drafter.blocks(self._rows.tables, slots, contexts, anchors)
        return output, self._drafter.logits(output)

    def _propose(self, slots: Ints, output: Tensor, logits: Tensor) -> int:
        """Put trees below the roots, level by level, and learn their worth; returns the rows that were sampled."""
        limits = self.slots.round_depths(slots)
        most = max(1, min(self._limits.rows_per_sequence, self._limits.max_rows // len(slots)))
        owners, nodes = np.arange(len(slots)), np.zeros(len(slots), dtype=np.int64)
        found: list[tuple[Ints, Floats]] = []
        num_rows = 0
        for level in range(self._shape.num_levels):
            deep_enough = limits[owners] > level
            owners, nodes = owners[deep_enough], nodes[deep_enough]
            if not len(nodes):
                break
            previous = self.trees.tokens[slots[owners], nodes]
            at = torch.from_numpy(owners).to(logits.device)
            rows, told = self._drafter.after(logits[at, level], output[at, level], previous)
            tokens, log_probs, scores = self._candidates_of(slots, owners, nodes, level, rows)
            num_rows += len(tokens)
            sureness = told.cpu().numpy().astype(np.float64) if len(told) else log_probs[:, 0]
            own, children, values = self._add(slots[owners], owners, nodes, level, tokens, scores, sureness)
            found.append((own, values))
            # Best first; those of a sequence together, of which the first few go on.
            order = np.lexsort((-values, own))
            own, children, values = own[order], children[order], values[order]
            place = np.arange(len(own)) - np.searchsorted(own, own)
            goes_on = (place < most) & (values > _LEAST_VALUE)
            owners, nodes = own[goes_on], children[goes_on]
        owners, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self._yields.learn_found(self.slots.laws[slots], owners, values)
        return num_rows

    def _candidates_of(
        self, slots: Ints, owners: Ints, nodes: Ints, level: int, rows: Tensor
    ) -> tuple[Ints, Floats, Floats]:
        """By logits [M, V'] after nodes int64 [M], best first, tokens, log-probabilities, and these with the noise;
        [M, children] each."""
        sampled = []
        for owner in dict.fromkeys(owners.tolist()):
            slot, own = int(slots[owner]), nodes[owners == owner]
            params, penalties = self._laws[slot]
            positions = np.full(len(own), self.trees.root_positions[slot] + 1 + level)
            paths: list[list[int]] = []
            if params.follows_text:
                paths = [self.trees.path(slot, node) for node in own.tolist()]
            sampled.append(SampledRows(params, positions, penalties, paths, self.trees.words(slot, paths)))
        ids, log_probs = self._sampler.propose(rows, sampled, self._limits.max_children)
        tokens, laws = ids.numpy(), log_probs.numpy().astype(np.float64)
        return tokens, laws, perturbed(laws, tokens, sampled)

    def _add(
        self,
        slots: Ints,
        owners: Ints,
        nodes: Ints,
        level: int,
        tokens: Ints,
        scores: Floats,
        sureness: Floats,
    ) -> tuple[Ints, Ints, Floats]:
        """Put candidates below nodes of slots ([M] each) into the trees: of those that are there then, owners, nodes
        and values; [N] each."""
        laws = self.slots.laws[slots]
        priors = self._spreads.probabilities(scores, sureness, laws, level)
        kinds = certainty_of(priors) + self._first_source + level * NUM_CERTAINTIES
        estimates = self.estimator.estimate(kinds, priors, self.slots.rules[slots][:, None])
        for row, (slot, node) in enumerate(zip(slots.tolist(), nodes.tolist(), strict=True)):
            path, sure = tuple(self.trees.path(slot, node)), float(sureness[row])
            self._asked[slot].append(Asked(path, tokens[row], scores[row], sure, int(laws[row])))
        # Top-k, top-p or min-p removed what has no probability: the target cannot pick it.
        possible = scores > -np.inf
        rows = possible.nonzero()[0]
        at, parents, proposed = slots[rows], nodes[rows], tokens[possible]
        values = self.trees.add_children(at, parents, proposed, estimates[possible], kinds[possible])
        children, is_there = self.trees.find_children(at, parents, proposed)
        return owners[rows][is_there], children[is_there], values[is_there]


def _check_taps(taps: tuple[int, ...], target: ModelConfig) -> None:
    if max(taps) > target.num_layers:
        raise ValueError(
            f"{_FIELD} must read layers of the target, which has {target.num_layers}, got inputs of {list(taps)}"
        )
