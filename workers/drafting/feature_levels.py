"""What draft methods on the target's hidden rows have in common: a layer of their own grows the tree level by level.

A row of the drafter stands for a token and the feature of the position before it. Of known tokens the features are
the target's own, below the root they are the drafter's outputs. So a node can be expanded once its parent has been,
and a verdict keeps the proposals below the tokens that came out, but no row of a node: those of tokens that are known
by then are computed again from what the target said of them, on the way to the next proposals.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Self

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.transfers import upload
from outrider.workers.capacity import num_draft_pages
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.features import FeatureStore
from outrider.workers.drafting.growing_levels import GrowingLevelMethod
from outrider.workers.drafting.levels import ROWS_PER_STEP, LevelLimits
from outrider.workers.drafting.method import MethodContext, Verified
from outrider.workers.drafting.row_cache import Expansion, RowCache
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.batch import TreeRows, build_batch, lay_out
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.drafter_graphs import graphed_steps
from outrider.workers.model.embedding import Embedding
from outrider.workers.model.feature_drafter import CachedDrafter, FeatureDrafter
from outrider.workers.model.shard import ShardPlan
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.segments import starts_of
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Bools, Floats, Ints, Survivors, Window
from outrider.workers.sequences.vocabulary import Vocabulary
from outrider.workers.setup import kernels_for, torch_dtype
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer

_NO_INTS = np.zeros(0, dtype=np.int64)


class FeatureMethod(GrowingLevelMethod):
    """Grows trees with a drafter of one layer. Who derives from this builds the drafter."""

    is_trained = True

    def __init__(
        self,
        slots: DraftedSlots,
        estimator: AcceptanceEstimator,
        taps: tuple[int, ...],
        drafter: CachedDrafter,
        pool: PagePool,
        sampler: Sampler,
        limits: LevelLimits,
        tracer: Tracer,
    ) -> None:
        """`taps`: the target's layers, as in `Hidden`, of which features are made; `pool`: of the drafter's cache;
        `sampler`: over the ids of its LM head."""
        stretches = Stretches(drafter.device, tracer)
        rows = RowCache(slots, pool, num_rowless=1, window=drafter.model.widest_window)
        super().__init__(slots, estimator, rows, sampler, drafter.model.vocab_size, limits, stretches)
        self.needs = HiddenNeeds(taps, of_context=True)
        self._drafter = drafter
        # More features than the cache has rows could never all be read.
        self._features = FeatureStore(len(slots), pool.num_pages * pool.page_size)
        # By node, what the drafter made of it: the feature for its children.
        num_nodes = self.trees.tokens.size
        self._graphs = graphed_steps(drafter, num_nodes)
        self._outputs = (
            self._graphs.of_nodes
            if self._graphs is not None
            else torch.zeros(num_nodes, drafter.model.hidden_size, dtype=drafter.dtype, device=drafter.device)
        )
        if self._graphs is not None:
            graphs = self._graphs
            self.grow_by(graphs, drafter.kernels, drafter.cache, graphs.capacities, graphs.pool)
        self._moves = (_NO_INTS, _NO_INTS)  # features that steps without the host left for nodes, and theirs
        # By node that can be expanded: the place of the node that promises most for each step on the way to it.
        self._goal_of, self._steps_to = (np.zeros(self.trees.tokens.size, dtype=np.int64) for _ in range(2))

    @classmethod
    def over_pages(
        cls,
        context: MethodContext,
        taps: tuple[int, ...],
        drafter: FeatureDrafter,
        embedding: Embedding,
        vocabulary: Vocabulary,
    ) -> Self:
        """With a cache as the configuration says.

        Args:
            drafter: as `for_serving` gives it; embedding: the target's; vocabulary: of the drafter's LM head.
        """
        config, device, own = context.config, context.device, drafter.model
        dtype, page_size = torch_dtype(config.draft.dtype), config.target.page_size
        num_pages = num_draft_pages(config, own)
        kernels = kernels_for(config, own, device, dtype)
        cache = PagedCache(own, ShardPlan(own, 0, 1), num_pages, page_size, dtype, device, kernels.kv_commit)
        rounds = config.rounds
        return cls(
            slots=context.slots,
            estimator=context.estimator,
            taps=taps,
            drafter=CachedDrafter(drafter, embedding, cache, kernels),
            pool=PagePool(num_pages, page_size, rounds.prefix_sharing),
            sampler=Sampler(len(vocabulary), vocabulary, SoloCommunicator(), kernels),
            limits=LevelLimits(
                max_children=min(config.tree.max_children, len(vocabulary)),
                rows_per_sequence=ROWS_PER_STEP,
                max_rows=max(ROWS_PER_STEP, rounds.max_sequences),
                prefill_chunk=rounds.prefill_chunk,
            ),
            tracer=context.tracer,
        )

    def prefix_kept(self, sequence: Sequence) -> int:
        """Rows in shared pages: each was made of the feature at its own index, so that these are not needed again."""
        return self._rows.num_shared(sequence)

    def start(self, sequence: Sequence) -> None:
        """Take the shared pages; features come from where the target begins to read."""
        super().start(sequence)
        slot = sequence.slot
        self._features.start(slot, int(self._rows.context_lens[slot]), sequence.num_committed)

    def finish(self, sequence: Sequence) -> None:
        """Give pages and features back."""
        super().finish(sequence)
        self._features.finish(sequence.slot)

    @torch.inference_mode()
    def observe(self, verified: Verified) -> None:
        """Keep the features of the tokens that the target has rows of now."""
        if verified.hidden is None:
            return
        self._features.keep(verified, self.needs.layers, self._drafter.features, self._outputs.shape[1])
        self._planned = None

    def rerooted(self, survivors: Survivors) -> None:
        """Of the old roots' rows the known text is one longer; the nodes' rows are made of guesses."""
        self._rows.drop_trees(survivors.slots)
        self._features.drop_read(survivors.slots, self._rows.context_lens[survivors.slots])
        self._laws.rerooted(survivors)

    def _num_readable(self, slots: Ints) -> Ints:
        here = self._features.ends[slots] - self._rows.context_lens[slots]
        here *= ~self._features.is_lost[slots]
        return np.minimum(self._rows.num_unread(slots), here)

    def _can_grow(self, slots: Ints) -> Bools:
        # The first token of a text has no row.
        num_tokens = self.slots.num_tokens[slots]
        return self._features.have_all(slots, num_tokens) & (num_tokens > 1)

    def _reachable(self, window: Window, gains: Floats, has_row: Bools) -> Floats:
        """What is promised further down counts for the first node on the way that has no row, shared by the steps."""
        flat = self.trees.flat
        depths = flat.depths[window.places]
        own = np.arange(gains.size).reshape(gains.shape)
        above = window.starts[:, None] + flat.parents[window.places] * (flat.values[window.places] > 0.0)
        is_open = ~has_row & (has_row.reshape(-1)[above] | (above == own))
        tops = np.where(is_open | has_row, own, above)
        for _ in range(int(depths.max(initial=0)).bit_length()):
            tops = tops.reshape(-1)[tops]
        steps = np.maximum(depths - depths.reshape(-1)[tops] + 1, 1)  # padding has any depths
        shares = gains / steps
        best = np.zeros(gains.size)
        np.maximum.at(best, tops.reshape(-1), shares.reshape(-1))
        is_goal = (shares > 0.0) & (shares == best[tops])
        places = window.places.reshape(-1)[tops[is_goal]]
        self._goal_of[places], self._steps_to[places] = window.places[is_goal], steps[is_goal]
        return best.reshape(gains.shape) * is_open

    def _goals(self, places: Ints) -> tuple[Ints, Ints]:
        return self._goal_of[places], self._steps_to[places]

    def _read_known(self, rows: TreeRows) -> None:
        counts = zip(rows.slots.tolist(), rows.query_lens.tolist(), strict=True)
        self._forward(rows, torch.cat([self._features.next(slot, count) for slot, count in counts]))
        self._features.drop_read(rows.slots, rows.context_lens + rows.query_lens)

    def _logits(self, expansion: Expansion, others: SequenceABC[Tensor]) -> tuple[Tensor, list[Tensor]]:
        rows = expansion.rows
        self._put_moved()
        rows_below, parents_of = self._below(expansion)
        node_rows, places = map(torch.from_numpy, (expansion.node_rows, expansion.places))
        batch = lay_out(self._rows.tables, rows)
        if self._graphs is not None:
            there = self._graphs.take(
                batch, (rows_below, parents_of), (node_rows, places), [node_rows, *others]
            )
            if there is not None:
                self._put_known(expansion, self._graphs.of_known)
                self._stretches.begin()
                logits = self._graphs.run()
                node_rows, *asked = there
                if len(node_rows) < len(logits):
                    logits = gather_rows(logits, node_rows, self._drafter.kernels.gather_rows)
                return logits, asked
        batch, there = batch.along_with(
            [rows_below, parents_of, node_rows, places, *others], self._drafter.device
        )
        rows_below, parents_of, node_rows, places, *asked = there
        features = self._outputs.new_empty(len(rows.tokens), self._outputs.shape[1])
        self._put_known(expansion, features)
        self._stretches.begin()
        features[rows_below] = self._outputs[parents_of]
        output = self._drafter.forward(batch, features)[node_rows]
        self._outputs[places] = output
        return self._drafter.logits(output), asked

    def _below(self, expansion: Expansion) -> tuple[Tensor, Tensor]:
        """int64 on the host: the rows of nodes below roots, and the places of their parents."""
        below = expansion.nodes > 0
        parents = (
            expansion.places[below]
            - expansion.nodes[below]
            + self.trees.flat.parents[expansion.places[below]]
        )
        return torch.from_numpy(expansion.node_rows[below]), torch.from_numpy(parents)

    def _growing_inputs(self, expansion: Expansion) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        graphs = self._graphs
        assert graphs is not None
        self._put_known(expansion, graphs.of_known)
        moves = (torch.from_numpy(self._moves[0]), torch.from_numpy(self._moves[1]))
        return graphs.reads(len(expansion.rows.tokens), self._below(expansion)), moves

    def _has_grown(self, features: Ints, places: Ints) -> None:
        self._moves = (features, places)

    def _put_moved(self) -> None:
        """What steps without the host left for nodes, to where steps by the host look for it."""
        if len(self._moves[0]) and self._graphs is not None:
            sources, targets = upload([*map(torch.from_numpy, self._moves)], self._drafter.device)
            self._graphs.features.index_copy_(0, targets, self._graphs.features[sources])
            self._moves = (_NO_INTS, _NO_INTS)

    def _put_known(self, expansion: Expansion, features: Tensor) -> None:
        """The target's features of known tokens, at the rows that read them. features: [rows or more, hidden]."""
        rows = expansion.rows
        firsts = expansion.nodes[starts_of(expansion.num_nodes)]
        # Known tokens come first, and the root, if it is there, is the last of them.
        counts = expansion.num_catching_up + (firsts == 0)
        begins = starts_of(rows.query_lens)
        for slot, begin, count in zip(rows.slots.tolist(), begins.tolist(), counts.tolist(), strict=True):
            if count:
                features[begin : begin + count] = self._features.next(slot, count)

    def _timed_logits(self, rows: TreeRows) -> Tensor:
        return self._drafter.logits(self._forward(rows, self._outputs[: len(rows.tokens)]))

    def _forward(self, rows: TreeRows, features: Tensor) -> Tensor:
        """[num_rows, hidden]. Its stretch of time begins here."""
        batch = build_batch(self._rows.tables, rows, self._drafter.device)
        self._stretches.begin()
        return self._drafter.forward(batch, features)
