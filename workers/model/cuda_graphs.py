"""The forward as CUDA graphs of fixed capacities: a batch is padded to the smallest that holds it and replayed.

Not run on a GPU by the maintainers. `StaticBatch`, the padding, is tested on the CPU executors.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outrider.kernels.tree_batch import TreeBatch
from outrider.workers.distributed import GroupCommunicator
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.transformer import Transformer

# Rows of the graphs that are captured; larger batches (prompt chunks) run without a graph.
GRAPH_ROWS = (8, 16, 32, 64, 128, 256)
MAX_SEQUENCES = 64
WARM_UP_RUNS = 3


@dataclass(frozen=True)
class GraphCapacity:
    """The largest batch a graph takes.

    Attributes:
        num_rows: query rows of all sequences.
        num_sequences: sequences.
        max_pages: pages of a sequence.
        mask_words: words of an ancestor mask, 64 tree rows each.
        max_keys: cache rows of a sequence, tree included; the kernel's split is chosen for it.
    """

    num_rows: int
    num_sequences: int
    max_pages: int
    mask_words: int
    max_keys: int

    def holds(self, batch: ForwardBatch) -> bool:
        tree = batch.tree
        keys = (c + t for c, t in zip(tree.host_context_lens, tree.host_tree_lens, strict=True))
        return (
            tree.num_queries <= self.num_rows
            and tree.num_sequences <= self.num_sequences
            and tree.page_table.shape[1] <= self.max_pages
            and tree.ancestors.shape[1] <= self.mask_words
            and max(keys, default=0) <= self.max_keys
        )


class StaticBatch:
    """A batch of constant shape and address. Rows and sequences beyond the real ones are padding: their slots are
    negative, so that nothing is written, and their sequences have no queries, so that nothing is attended."""

    def __init__(self, capacity: GraphCapacity, page_size: int, device: torch.device) -> None:
        B, N = capacity.num_sequences, capacity.num_rows

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.capacity = capacity
        self.batch = ForwardBatch(
            tokens=zeros(N, dtype=torch.int64),
            positions=zeros(N, dtype=torch.int64),
            slots=zeros(N, dtype=torch.int64) - 1,
            tree=TreeBatch(
                page_table=zeros(B, capacity.max_pages),
                context_lens=zeros(B),
                tree_lens=zeros(B),
                query_indptr=zeros(B + 1),
                ancestors=zeros(N, capacity.mask_words, dtype=torch.int64),
                depths=zeros(N),
                page_size=page_size,
                # The launch is planned for the largest: one sequence may bring all rows, and all may be long.
                host_context_lens=(capacity.max_keys,) * B,
                host_tree_lens=(0,) * B,
                host_query_lens=(N,) * B,
            ),
        )

    def fill(self, batch: ForwardBatch) -> None:
        """Copies a batch that fits, without a wait."""
        assert self.capacity.holds(batch)
        mine, theirs = self.batch, batch
        _fill_rows(mine.tokens, theirs.tokens, 0)
        _fill_rows(mine.positions, theirs.positions, 0)
        _fill_rows(mine.slots, theirs.slots, -1)
        _fill_rows(mine.tree.depths, theirs.tree.depths, 0)
        _fill_rows(mine.tree.context_lens, theirs.tree.context_lens, 0)
        _fill_rows(mine.tree.tree_lens, theirs.tree.tree_lens, 0)
        _fill_rows(mine.tree.query_indptr, theirs.tree.query_indptr, theirs.tree.num_queries)
        for target, source in (
            (mine.tree.page_table, theirs.tree.page_table),
            (mine.tree.ancestors, theirs.tree.ancestors),
        ):
            target.zero_()
            target[: source.shape[0], : source.shape[1]].copy_(source, non_blocking=True)


def _fill_rows(target: Tensor, source: Tensor, padding: int) -> None:
    target[: source.shape[0]].copy_(source, non_blocking=True)
    target[source.shape[0] :].fill_(padding)


class GraphedForward:
    """`Transformer.forward` for decoding and verification, replayed from graphs; everything else runs as it is.

    Every rank of a target must use the same capacities: the sums over ranks are part of the graphs.
    """

    def __init__(self, model: Transformer, cache: PagedCache, capacities: list[GraphCapacity]) -> None:
        assert can_be_captured(model)
        self._model = model
        self._cache = cache
        self._graphs: list[tuple[StaticBatch, torch.cuda.CUDAGraph, Tensor]] = []
        for capacity in sorted(capacities, key=lambda c: c.num_rows):
            self._graphs.append(self._capture(capacity))

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """[N, hidden] before the final norm, valid until the next call."""
        for static, graph, hidden in self._graphs:
            if static.capacity.holds(batch):
                static.fill(batch)
                graph.replay()
                return hidden[: batch.tree.num_queries]
        return self._model.forward(batch, self._cache)

    def _capture(self, capacity: GraphCapacity) -> tuple[StaticBatch, torch.cuda.CUDAGraph, Tensor]:
        static = StaticBatch(capacity, self._cache.page_size, self._model.device)
        side = torch.cuda.Stream(self._model.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):  # compiles and loads kernels, opens NCCL connections
                self._model.forward(static.batch, self._cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self._model.forward(static.batch, self._cache)
        return static, graph, hidden


def can_be_captured(model: Transformer) -> bool:
    """The kernels can, the references and sums over ranks on the host cannot."""
    kernels, communicator = model.kernels, model.communicator
    on_gpu = isinstance(communicator, GroupCommunicator) and communicator.transport == "nccl"
    return (
        model.device.type == "cuda"
        and kernels.tree_attention
        and kernels.rope_append
        and (communicator.size == 1 or on_gpu)
    )


def forward_of(model: Transformer, cache: PagedCache) -> Callable[[ForwardBatch], Tensor]:
    """The model's forward over a cache, by graphs where that is possible. Ranks must call it together."""
    if not can_be_captured(model):
        return partial(model.forward, cache=cache)
    max_context = min(model.config.max_context, cache.num_pages * cache.page_size)
    try:
        return GraphedForward(model, cache, capacities_for(MAX_SEQUENCES, max_context, cache.page_size))
    except RuntimeError as error:
        warnings.warn(f"the forward runs without CUDA graphs: {error}", stacklevel=2)
        return partial(model.forward, cache=cache)


def capacities_for(num_sequences: int, max_context: int, page_size: int) -> list[GraphCapacity]:
    """Graphs for up to `num_sequences` sequences of up to `max_context` tokens, trees included."""
    max_pages = -(-max_context // page_size)
    return [
        GraphCapacity(rows, min(rows, num_sequences), max_pages, -(-rows // 64), max_context)
        for rows in GRAPH_ROWS
    ]
