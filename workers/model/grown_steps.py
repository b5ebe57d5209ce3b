"""Several steps of a drafter that follow each other without the host: behind each, a kernel picks what is worth most
of what was proposed, and makes the next step's rows of it. The host hands over the first step, and gets all that was
proposed by all of them in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from outrider.kernels import grow_trees as growing
from outrider.kernels import sample_shard as sampling
from outrider.kernels.growth import FirstStep, Growth, GrowthShape, NextStep, Places, steps_of
from outrider.kernels.sample_shard import ROW, answer_parts
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.transfers import Part, views_of
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import recorded, warm_up
from outrider.workers.model.static_batch import GraphCapacity, StaticBatch
from outrider.workers.model.transformer import Transformer
from outrider.workers.sequences.tree import Ints

MAX_GROWN_STEPS = 8
"""That follow each other without the host."""
_NO_ROW = 255  # in every byte: a record that asks for nothing


class _Buffers(NamedTuple):
    """Of one capacity: where the first step is copied to, and what the later ones leave to each other."""

    shape: GrowthShape
    static: StaticBatch
    first: FirstStep
    growth: Growth
    next_step: NextStep
    next_batch: ForwardBatch


class LevelForward(Protocol):
    """A drafter's forward over rows of trees, as graphs record it. One that is made of features reads and writes them
    by index, others take no notice.

    Attributes:
        num_moves: features that may have to move before a first step reads them.
        first_nodeless: index of the first feature for rows that have no node yet.
        nobodys: index of what nobody reads.
    """

    @property
    def num_moves(self) -> int: ...

    @property
    def first_nodeless(self) -> int: ...

    @property
    def nobodys(self) -> int: ...

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Features, by index, int64 [num_moves] each."""
        ...

    def level(self, batch: ForwardBatch, reads: Tensor, writes: Tensor) -> Tensor:
        """float32 [N, V']: the logits of all rows of a batch, which read and leave these features (int64 [N])."""
        ...


@dataclass(frozen=True)
class TransformerLevels:
    """Of a whole model on one rank. A `LevelForward`."""

    model: Transformer
    cache: PagedCache
    num_moves: int = 0
    first_nodeless: int = 0
    nobodys: int = 0

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """There are no features."""

    def level(self, batch: ForwardBatch, reads: Tensor, writes: Tensor) -> Tensor:
        """By tokens alone."""
        return self.model.logits(self.model.forward(batch, self.cache, ()).last)


class GrownSteps:
    """Steps of up to `MAX_GROWN_STEPS` levels. One graph is of a first step, one of each that follows it."""

    def __init__(
        self,
        forward: LevelForward,
        capacities: Sequence[GraphCapacity],
        cache: PagedCache,
        ids: ShardIds,
        num_best: int,
        num_target_tokens: int,
        pool: object = None,
    ) -> None:
        """
        Args:
            capacities: of first steps, and of each later one.
            cache: the drafter's.
            ids: of the drafter's LM head.
            num_best: proposals below a node.
            num_target_tokens: ids from there on are never expanded.
            pool: memory of other graphs, which these may share.

        Raises:
            Exception: something cannot be captured, a kernel does not run, or there is no memory left.
        """
        self._forward, self._ids, self._num_best = forward, ids, num_best
        self._page_size, self._device = cache.page_size, cache.kv.device
        self._table = ids.table_on(self._device)
        self._places = Places(
            cache.page_size, ids.first, num_target_tokens, forward.first_nodeless, forward.nobodys
        )
        self._no_edits = torch.empty(0, dtype=torch.uint8, device=self._device)
        capacities = sorted(capacities, key=lambda capacity: capacity.num_rows)
        self._buffers = [self._buffers_of(capacity) for capacity in capacities]
        by_static = {id(buffers.static): buffers for buffers in self._buffers}
        statics = [buffers.static for buffers in self._buffers]
        self._graphs = []
        pool = pool or torch.cuda.graph_pool_handle()
        for compute in (self._first, self._later):

            def of_static(static: StaticBatch, compute=compute) -> None:  # type: ignore[no-untyped-def]
                compute(by_static[id(static)])

            for static in statics:
                of_static(static)
            self._buffers[0].growth.num_done.cpu()  # waits, so that errors come up here
            warm_up(statics, of_static, self._device)
            self._graphs.append([graph for _, graph, _ in recorded(statics, of_static, pool)])

    def place_for(self, batch: ForwardBatch, num_each: int, num_steps: int) -> int | None:
        """Which graphs take this first step and so many steps in all of `num_each` rows for each sequence."""
        tree, num_further = batch.tree, num_each * (num_steps - 1)
        for index, buffers in enumerate(self._buffers):
            capacity = buffers.static.capacity
            most_keys = max(c + t for c, t in zip(tree.host_context_lens, tree.host_tree_lens, strict=True))
            fits = capacity.holds(batch) and num_each * tree.num_sequences <= capacity.num_rows
            fits &= most_keys + num_further <= capacity.max_keys
            if fits and max(tree.host_tree_lens) + num_further <= 64 * capacity.mask_words:
                return index
        return None

    def shape(self, place: int) -> GrowthShape:
        return self._buffers[place].shape

    def features_of(self, rows: Ints) -> Ints:
        """The features that rows leave, counted over all steps as `Growth` does."""
        return rows + self._places.first_feature

    def take(
        self,
        place: int,
        batch: ForwardBatch,
        reads: Tensor,
        node_rows: Tensor,
        moved: tuple[Tensor, Tensor],
        asked: Tensor,
        given: Sequence[Tensor],
    ) -> None:
        """The first step to the device.

        Args:
            place: of `place_for`.
            reads: int64 [rows], the features that rows read.
            node_rows: int64, rows of nodes.
            moved: int64 each, features that move before anything is read: from, to.
            asked: uint8 [rows, ROW], of all rows of the batch.
            given: `FirstStep.parts`, on the host, the first of them.
        """
        static, num_rows = self._buffers[place].static, batch.tree.num_queries
        writes = torch.full((num_rows,), self._places.nobodys_feature)
        writes[node_rows] = node_rows + self._places.first_feature
        static.fill(batch, (), (*moved, reads, writes, asked, *given))
        self._taken = place

    def run(self, num_steps: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """So many steps, the one that was taken included; of each what `steps_of` tells."""
        first, later = (graphs[self._taken] for graphs in self._graphs)
        first.replay()
        for _ in range(num_steps - 1):
            later.replay()
        buffers = self._buffers[self._taken]
        return steps_of(buffers.growth.history[:num_steps].cpu(), buffers.shape)

    def _buffers_of(self, capacity: GraphCapacity) -> _Buffers:
        device, rows = self._device, capacity.num_rows
        shape = GrowthShape(
            rows, capacity.num_sequences, self._num_best, MAX_GROWN_STEPS, capacity.mask_words
        )
        nobodys = self._forward.nobodys
        moves = (Part((self._forward.num_moves,), torch.int64), nobodys)
        of_rows = (Part((rows,), torch.int64), nobodys)
        asked = (Part((rows, ROW.itemsize), torch.uint8), _NO_ROW)
        given = [(part, 0) for part in FirstStep.parts(shape)]
        extras = (moves, moves, of_rows, of_rows, asked, *given)
        static = StaticBatch(capacity, self._page_size, device, extras)
        next_step = NextStep.empty(shape, device)
        batch = static.batch
        tree = replace(
            batch.tree,
            tree_lens=next_step.tree_lens,
            query_indptr=next_step.query_indptr,
            ancestors=next_step.masks,
            depths=next_step.depths,
        )
        own = (next_step.tokens, next_step.positions, next_step.kv_rows)
        header, sequences, seen, values, depths = static.extras[5:]
        first = FirstStep(header, sequences, seen, values, depths, batch.tree.ancestors)
        return _Buffers(
            shape, static, first, Growth.empty(shape, device), next_step, ForwardBatch(*own, tree)
        )

    @torch.inference_mode()
    def _first(self, buffers: _Buffers) -> None:
        sources, targets, reads, writes, asked = buffers.static.extras[:5]
        self._forward.move(sources, targets)
        self._step(buffers, buffers.static.batch, reads, writes, asked, is_first=True)

    @torch.inference_mode()
    def _later(self, buffers: _Buffers) -> None:
        following = buffers.next_step
        self._step(
            buffers, buffers.next_batch, following.reads, following.writes, following.rows, is_first=False
        )

    def _step(
        self,
        buffers: _Buffers,
        batch: ForwardBatch,
        reads: Tensor,
        writes: Tensor,
        asked: Tensor,
        is_first: bool,
    ) -> None:
        shape = buffers.shape
        logits = self._forward.level(batch, reads, writes)
        counts = [shape.max_rows, shape.num_best, 0, 0, 0, 0]
        answers = sampling.sample_shard_op(
            logits, asked, self._no_edits, self._table, self._ids.first, counts
        )
        sums, winners, *_ = views_of(answers, answer_parts(*counts))
        growing.grow_trees(
            buffers.first,
            sums,
            winners,
            self._table,
            batch.tree.page_table,
            buffers.growth,
            buffers.next_step,
            shape,
            self._places,
            is_first,
            use_kernel=True,
        )
