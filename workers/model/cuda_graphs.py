"""The forward as CUDA graphs of fixed capacities: a batch is padded to the smallest that holds it and replayed.

Graphs ran on an H100 (docs/gpu-report.md).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from outrider.kernels.tree_batch import MASK_WORD_BITS
from outrider.workers.link.communicator import Communicator, SoloCommunicator, agreed
from outrider.workers.link.distributed import GroupCommunicator
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.static_batch import GraphCapacity, StagedBytes, StaticBatch
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.model.whole_rounds import Around, WholeRounds, extras_of
from outrider.workers.weights.config import ModelConfig

Result = TypeVar("Result")

# Rows of the graphs that are captured; larger batches (prompt chunks) run without a graph.
TARGET_ROWS = (8, 16, 32, 64, 128, 256)
DRAFT_ROWS = (8, 16, 32, 64)  # a step expands few nodes of each tree, after the tokens of the last verdict
MAX_DRAFT_TREE_ROWS = 256  # of a tree that a drafter grows by graphs
MAX_SEQUENCES = 64
WARM_UP_RUNS = 3


class Described(Protocol):
    """A model, or who knows its sizes only."""

    @property
    def config(self) -> ModelConfig: ...


class Pages(Protocol):
    """A cache, or who knows its sizes only."""

    @property
    def num_pages(self) -> int: ...

    @property
    def page_size(self) -> int: ...


@dataclass(frozen=True)
class StagedBatch:
    """For a forward without a graph, whose arrays have no place yet."""

    batch: ForwardBatch
    others: Sequence[Tensor]
    is_whole: bool = False


@dataclass(frozen=True)
class StagedReplay:
    """For a graph, with what it reads and writes.

    Attributes:
        num_rows: of the batch.
        is_whole: what is around the forward is in the graph.
    """

    content: StagedBytes
    graphed: Graphed
    num_rows: int
    is_whole: bool


class Forward(ABC):
    """A model's forward over a cache, of batches that `lay_out` made."""

    @abstractmethod
    def stage(
        self, batch: ForwardBatch, others: Sequence[Tensor] = (), around: Around | None = None
    ) -> Staged:
        """A batch of the host, and other tensors of it, made ready for `send`. The device may still be at the batch
        before, and its results in use.

        around: what `run` is to do besides, if it can (`Staged.is_whole`); if not, its tensors are sent behind the
            others.
        """

    @abstractmethod
    def send(self, staged: Staged) -> list[Tensor]:
        """Both to the device in one copy, the batch for `run`; returns the others, valid until the next call."""

    @abstractmethod
    def run(self) -> Hidden:
        """Of the batch that was sent; valid until the next call."""

    def take(self, batch: ForwardBatch, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """`stage` and `send`."""
        return self.send(self.stage(batch, others))

    def __call__(self, batch: ForwardBatch) -> Hidden:
        """All of them."""
        self.take(batch)
        return self.run()


class EagerForward(Forward):
    """Operation by operation."""

    def __init__(self, model: Transformer, cache: PagedCache, taps: Sequence[int]) -> None:
        self._device = model.device
        self._forward = partial(model.forward, cache=cache, taps=tuple(taps))

    def stage(
        self, batch: ForwardBatch, others: Sequence[Tensor] = (), around: Around | None = None
    ) -> Staged:
        return StagedBatch(batch, [*others, *around.on_host()] if around else others)

    def send(self, staged: Staged) -> list[Tensor]:
        assert isinstance(staged, StagedBatch)
        self._batch, there = staged.batch.along_with(staged.others, self._device)
        return there

    def run(self) -> Hidden:
        return self._forward(self._batch)


class GraphedForward(Forward):
    """`Transformer.forward` for decoding and verification, replayed from graphs; everything else runs as it is.

    Every rank of a target must use the same capacities: the sums over ranks are part of the graphs. So every rank
    calls `rehearse`, `warm_up` and `capture`, in this order; see `forward_of` for what happens when one fails.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        capacities: Sequence[GraphCapacity],
        taps: Sequence[int] = (),
        with_logits: bool = False,
        whole: WholeRounds | None = None,
    ) -> None:
        """`taps`, logits and what is around (`whole`, with logits) are recorded with the graphs, so they are the same
        for every batch."""
        assert with_logits or whole is None
        self._whole = whole
        self._model = model
        self._eager = EagerForward(model, cache, taps)
        self._with_logits = with_logits
        self._taken: tuple[torch.cuda.CUDAGraph, Hidden] | None = None  # None: what fits no graph
        self._cache = cache
        self._taps = tuple(taps)
        self._capacities = sorted(capacities, key=lambda capacity: capacity.num_rows)
        self._statics: list[StaticBatch] = []
        self._graphs: list[Graphed] = []
        self.pool: object = None  # the graphs' memory

    def stage(
        self, batch: ForwardBatch, others: Sequence[Tensor] = (), around: Around | None = None
    ) -> Staged:
        for graphed in self._graphs:
            static = graphed[0]
            if static.capacity.holds(batch):
                num_rows = static.capacity.num_rows
                is_whole = bool(self._whole and around and self._whole.takes(around, num_rows))
                if around and not is_whole:
                    others = [*others, *around.on_host()]
                extras = self._whole.given(around if is_whole else None) if self._whole else ()
                content = static.stage(batch, others, extras)
                return StagedReplay(content, graphed, batch.tree.num_queries, is_whole)
        return self._eager.stage(batch, others, around)

    def send(self, staged: Staged) -> list[Tensor]:
        if not isinstance(staged, StagedReplay):
            self._taken = None
            return self._eager.send(staged)
        static, graph, hidden = staged.graphed
        self._taken = graph, hidden.first(staged.num_rows)
        return static.send(staged.content)

    def run(self) -> Hidden:
        """A graph writes its results where it did before."""
        if self._taken is None:
            return self._eager.run()
        graph, hidden = self._taken
        graph.replay()
        return hidden

    def rehearse(self) -> None:
        """What can fail on this rank: memory, compiling and loading kernels. Says nothing to the other ranks.

        Raises:
            Exception: there is no memory left, or a kernel cannot be compiled, loaded or run.
        """
        page_size, device = self._cache.page_size, self._model.device
        whole = self._whole
        self._statics = [
            StaticBatch(capacity, page_size, device, extras_of(capacity.num_rows) if whole else ())
            for capacity in self._capacities
        ]
        alone = Transformer(self._model.weights, SoloCommunicator(), self._model.kernels)
        for static in self._statics:
            hidden = self._computed(alone, static)
            hidden.last.cpu()  # waits, so that errors come up here

    def warm_up(self) -> None:
        """Opens the connections between ranks for sums of each size, which must not happen in a capture."""
        warm_up(self._statics, partial(self._computed, self._model), self._model.device)

    def capture(self) -> None:
        """Records the graphs. Sums over ranks are recorded, not made: no rank waits for another.

        Raises:
            Exception: something in the forward cannot be captured, or there is no memory left.
        """
        self.pool = torch.cuda.graph_pool_handle()
        self._graphs = recorded(self._statics, partial(self._computed, self._model), self.pool)

    def _computed(self, model: Transformer, static: StaticBatch) -> Hidden:
        if self._whole:
            self._whole.before(static.extras)
        hidden = model.forward(static.batch, self._cache, self._taps)
        if not self._with_logits:
            return hidden
        logits = model.logits(hidden.last)
        sampled = self._whole.behind(logits, static.extras) if self._whole else None
        return replace(hidden, logits=logits, sampled=sampled)


Graphed: TypeAlias = tuple[StaticBatch, torch.cuda.CUDAGraph, Hidden]
Staged: TypeAlias = StagedBatch | StagedReplay


def warm_up(
    statics: Sequence[StaticBatch], compute: Callable[[StaticBatch], object], device: torch.device
) -> None:
    """Runs what is to be recorded, on another stream, as a capture will."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for static in statics:
            for _ in range(WARM_UP_RUNS):
                compute(static)
    torch.cuda.current_stream().wait_stream(side)


def recorded(
    statics: Sequence[StaticBatch], compute: Callable[[StaticBatch], Result], pool: Any = None
) -> list[tuple[StaticBatch, torch.cuda.CUDAGraph, Result]]:
    """A graph for each batch, in their order, with what it writes.

    One graph runs at a time and its result is used before the next runs, so all share one pool of memory, and may
    share that of others. The largest, the last, is recorded first: what it freed is enough for the others.
    """
    pool = pool or torch.cuda.graph_pool_handle()
    graphs = []
    for static in reversed(statics):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = compute(static)
        graphs.append((static, graph, result))
    return graphs[::-1]


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


def forward_of(
    model: Transformer,
    cache: PagedCache,
    capacities: Sequence[GraphCapacity],
    taps: Sequence[int] = (),
    with_logits: bool = False,
    whole: WholeRounds | None = None,
) -> Forward:
    """By graphs where every rank can have them. Ranks must call it, and what it returns, together.

    `taps`: layers whose inputs every call returns beside the last hidden rows, see `Hidden`; `with_logits`: graphs
    give the logits of all rows, too; `whole`: and do what is around a round's forward. All the same on every rank.

    A rank that replays sums over ranks needs partners that replay them as well. So before the first sum the ranks
    agree that nothing is wrong with any of them alone, and after the captures that all have succeeded.

    Raises:
        PeerLostError: a rank was lost, or sums over ranks fail.
    """
    eager = EagerForward(model, cache, taps)
    if model.device.type != "cuda":
        return eager
    graphed = GraphedForward(model, cache, capacities, taps, with_logits, whole)
    (possible,) = agreed(model.communicator, [can_be_captured(model)])
    if possible and _all_manage(graphed.rehearse, model.communicator):
        graphed.warm_up()
        if _all_manage(graphed.capture, model.communicator):
            return graphed
    return eager


def _all_manage(prepare: Callable[[], None], communicator: Communicator) -> bool:
    """Whether `prepare` has gone well on every rank; a warning where it has not."""
    problem = ""
    try:
        prepare()
    except Exception as error:  # of torch, the CUDA driver or NVRTC, which have no class in common
        problem = str(error) or type(error).__name__
    (everywhere,) = agreed(communicator, [not problem])
    if not everywhere:
        reason = problem or "another rank cannot use them"
        warnings.warn(f"the forward runs without CUDA graphs: {reason}", stacklevel=3)
    return everywhere


def target_capacities(model: Described, cache: Pages, max_context: int) -> list[GraphCapacity]:
    """Graphs of a target, which computes whole trees: all rows that a mask tells of are in the batch.

    max_context: tokens of a sequence, at most; a tree may be behind them.
    """
    max_keys = max_context + max(TARGET_ROWS)
    return [_capacity(model, cache, rows, words_for(rows), max_keys) for rows in TARGET_ROWS]


def draft_capacities(model: Described, cache: Pages) -> list[GraphCapacity]:
    """Graphs of a drafter, which adds few rows at a time to trees whose other rows are in its cache."""
    max_keys, words = model.config.max_context, words_for(MAX_DRAFT_TREE_ROWS)
    return [_capacity(model, cache, rows, words, max_keys) for rows in DRAFT_ROWS]


def words_for(num_tree_rows: int) -> int:
    """Mask words for a tree of that many rows."""
    return -(-num_tree_rows // MASK_WORD_BITS)


def _capacity(model: Described, cache: Pages, num_rows: int, mask_words: int, max_keys: int) -> GraphCapacity:
    max_keys = min(max_keys, model.config.max_context, cache.num_pages * cache.page_size)
    max_pages = -(-max_keys // cache.page_size)
    return GraphCapacity(num_rows, min(num_rows, MAX_SEQUENCES), max_pages, mask_words, max_keys)
