"""The draft model on its ranks (`draft.tp_size`): rank 0 drafts, the others compute their parts of its forwards.

Rank 0 is a DraftWorker's method `model`; trees, sampling and verdicts are its business alone. Before each forward and
each move of cache rows it says what it is about to do, and the others do the same: a message of flat int32, as the
target's ranks get theirs. Sums over ranks are the Transformer's own. Logits come to rank 0 in the parts of the
vocabulary that ranks hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.configs.schema import Config
from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.selection import KernelSelection
from outrider.kernels.transfers import upload
from outrider.workers.capacity import num_draft_pages
from outrider.workers.drafting.rank_messages import PageNews, RankCommit, RankForward, RankStop, decode
from outrider.workers.link.communicator import Communicator, broadcast_message
from outrider.workers.link.lost import PeerLostError, RankLostError
from outrider.workers.model.batch import ForwardBatch, TreeRows, lay_out
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import GraphedForward, draft_capacities, forward_of
from outrider.workers.model.head import Head
from outrider.workers.model.loader import ModelWeights, load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import Int64Array
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.setup import agreed_kernels, counting, kernels_for, load_model, torch_dtype
from outrider.workers.timing import Stretches
from outrider.workers.weights.progress import Progress

_NO_MESSAGE = torch.empty(0, dtype=torch.int32)
_NO_ROWS: Int64Array = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class LoadedRank:
    """What a rank has read of the draft model, before it meets the others.

    kernels: those that it could use.
    """

    weights: ModelWeights
    kernels: KernelSelection

    def built(self, config: Config, communicator: Communicator) -> tuple[Transformer, PagedCache]:
        """The model and its cache; every rank calls it."""
        weights, page_size = self.weights, config.target.page_size
        kernels = agreed_kernels(self.kernels, communicator)
        num_pages = num_draft_pages(config, weights.plan.config, config.draft.tp_size)
        return Transformer(weights, communicator, kernels), PagedCache(
            weights.plan.config,
            weights.plan,
            num_pages,
            page_size,
            weights.dtype,
            weights.device,
            kernels.kv_commit,
        )


def load_rank(
    config: Config, rank: int, device: torch.device, progress: Progress, head: Head | None = None
) -> LoadedRank:
    """Read one rank's part of `draft.model`. `head`: instead of its own, which is then not read.

    Raises:
        ValueError: the checkpoint is missing or does not fit the configuration.
    """
    draft, dtype = config.draft, torch_dtype(config.draft.dtype)
    source = load_model(config, "draft", progress)
    plan = ShardPlan(source.config, rank, draft.tp_size, "draft")
    counted = counting(progress, source.total_bytes(dtype) // draft.tp_size)
    kernels = kernels_for(config, source.config, device, dtype)
    return LoadedRank(load_weights(plan, source, dtype, device, draft.packed_weights, counted, head), kernels)


class ModelRank:
    """One rank's part of the draft model and of its cache; all of it where there is one rank."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        """Every rank calls it at the same time: graphs are captured."""
        self.model = model
        self._cache = cache
        plan = model.plan
        plans = [ShardPlan(plan.config, rank, plan.size, plan.role) for rank in range(plan.size)]
        self._shard_sizes = [len(of.vocab) for of in plans]
        # Ranks that share a vocabulary gather the logits that are asked for.
        with_logits = model.communicator.size == 1
        self.run = forward_of(model, cache, draft_capacities(model, cache), with_logits=with_logits)

    @property
    def pool(self) -> object:
        """Memory of the graphs of its forwards; None where there are none, or this is not all of the model."""
        is_alone = self.model.communicator.size == 1
        return self.run.pool if is_alone and isinstance(self.run, GraphedForward) else None

    def batch(self, tables: PageTables, rows: TreeRows, wanted: Int64Array = _NO_ROWS) -> ForwardBatch:
        """Rows for one `forward`; `wanted`: those of which `logits` are asked after it."""
        return lay_out(tables, rows)

    def forward(self, batch: ForwardBatch, others: Sequence[Tensor] = ()) -> tuple[Hidden, list[Tensor]]:
        """Valid until the next call; and other tensors, which go to the device in the same copy as the batch."""
        there = self.run.take(batch, others)
        return self.run.run(), there

    def logits(self, hidden: Hidden, wanted: Tensor) -> Tensor:
        """Of the rows `wanted` (int64 [M], on the device) of a forward: float32 [M, V'], V' the head's tokens."""
        if hidden.logits is None:
            return self.model.logits_of(hidden.last, wanted)
        if len(wanted) == len(hidden.logits):
            return hidden.logits
        return gather_rows(hidden.logits, wanted, self.model.kernels.gather_rows)

    def gathered_logits(self, hidden: Hidden, wanted: Tensor) -> Tensor:
        """`logits` over the whole vocabulary, of which each rank has a part; every rank calls it."""
        assert len(wanted), "the others would not come"
        logits, sizes = self.model.logits_of(hidden.last, wanted), self._shard_sizes
        parts = self.model.communicator.all_gather(F.pad(logits, (0, max(sizes) - logits.shape[1])))
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def commit(self, sources: Int64Array, targets: Int64Array) -> None:
        """Move cache rows (int64 [M] each)."""
        moving = (torch.from_numpy(sources), torch.from_numpy(targets))
        self._cache.commit(*upload(moving, self.model.device))

    def close(self) -> None:
        """There will be no further call."""


class LeadingRank(ModelRank):
    """Rank 0 of several. Its calls raise RankLostError where another rank is gone or silent."""

    def __init__(self, model: Transformer, cache: PagedCache, num_slots: int) -> None:
        """num_slots: of the page tables."""
        super().__init__(model, cache)
        own = VocabularyRange(model.plan.vocab.start, model.plan.vocab.stop)
        # A head that came in place of the model's is whole on this rank.
        self._gathers = model.weights.head.vocabulary == own
        self._news = PageNews(num_slots, cache.page_size)

    def batch(self, tables: PageTables, rows: TreeRows, wanted: Int64Array = _NO_ROWS) -> ForwardBatch:
        batch = super().batch(tables, rows)
        pages = self._news.since(tables, rows.slots)
        self._say(RankForward(rows, wanted if self._gathers else _NO_ROWS, pages).encoded())
        return batch

    def forward(self, batch: ForwardBatch, others: Sequence[Tensor] = ()) -> tuple[Hidden, list[Tensor]]:
        with _in_company():
            return super().forward(batch, others)

    def logits(self, hidden: Hidden, wanted: Tensor) -> Tensor:
        if not self._gathers:
            return super().logits(hidden, wanted)
        with _in_company():
            return self.gathered_logits(hidden, wanted)

    def commit(self, sources: Int64Array, targets: Int64Array) -> None:
        self._say(RankCommit(sources, targets).encoded())
        super().commit(sources, targets)

    def close(self) -> None:
        with suppress(RankLostError):  # one that is gone need not be told
            self._say(RankStop().encoded())
        self.model.communicator.close()

    def _say(self, message: Tensor) -> None:
        with _in_company():
            broadcast_message(self.model.communicator, message)


def rank_0_of(model: Transformer, cache: PagedCache, num_slots: int) -> ModelRank:
    """Alone, or of several."""
    if model.communicator.size == 1:
        return ModelRank(model, cache)
    return LeadingRank(model, cache, num_slots)


@torch.inference_mode()
def follow(rank: ModelRank, num_slots: int, page_size: int, stretches: Stretches) -> None:
    """A further rank: do what rank 0 does, until it says stop. Raises PeerLostError."""
    tables, communicator = PageTables(num_slots, page_size), rank.model.communicator
    while True:
        match decode(broadcast_message(communicator, _NO_MESSAGE).numpy()):
            case RankForward(rows, wanted, pages):
                for slot, first, changed in pages:
                    tables.num_pages[slot] = first
                    tables.append(slot, changed)
                batch = rank.batch(tables, rows)
                stretches.begin()
                hidden, (index,) = rank.forward(batch, [torch.from_numpy(wanted)])
                if len(wanted):
                    rank.gathered_logits(hidden, index)
                stretches.end("forward", len(rows.tokens))
                stretches.settle()
            case RankCommit(sources, targets):
                rank.commit(sources, targets)
            case RankStop():
                return


@dataclass(frozen=True)
class NoHead:
    """Of a rank that is not asked for logits, because rank 0 has a head of its own."""

    @property
    def vocabulary(self) -> VocabularyRange:
        return VocabularyRange(0, 0)

    def __call__(self, normed: Tensor) -> Tensor:
        raise AssertionError("this rank has no head")


@contextmanager
def _in_company() -> Iterator[None]:
    try:
        yield
    except PeerLostError as error:
        raise RankLostError(f"the drafter lost one of its ranks: {error}") from error
