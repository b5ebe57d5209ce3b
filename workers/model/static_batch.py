"""A batch of constant shape in one buffer of the device, which CUDA graphs read; real batches are padded to it.

Tested on the CPU executors; graphs of it ran on an H100 (docs/gpu-report.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outrider.kernels.transfers import Part, num_bytes_of, stage, upload, views_of
from outrider.kernels.tree_batch import TreeBatch
from outrider.workers.model.batch import ForwardBatch

# Of a graph, for what comes along with a batch: 64 bytes for each row that is sampled, and some.
ROOM_BYTES = 1 << 15


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


@dataclass(frozen=True)
class StagedBytes:
    """What a `StaticBatch` takes in.

    Attributes:
        data: uint8, on the host, the whole copy.
        others: what stands in it before the batch.
        apart: others that found no room there.
    """

    data: Tensor
    others: Sequence[Part]
    apart: Sequence[Tensor] = ()


class StaticBatch:
    """A batch of constant shape and address, in one buffer. Rows and sequences beyond the real ones are padding:
    their KV rows are negative, so that nothing is written, and their sequences have no queries, so that nothing is
    attended."""

    def __init__(
        self,
        capacity: GraphCapacity,
        page_size: int,
        device: torch.device,
        extras: Sequence[tuple[Part, int]] = (),
    ) -> None:
        """extras: further arrays of constant shape, and what they hold behind what `fill` is given."""
        B, N = capacity.num_sequences, capacity.num_rows
        rows, lens = Part((N,), torch.int64), Part((B,), torch.int32)
        masks, pages = Part((N, capacity.mask_words), torch.int64), Part((B, capacity.max_pages), torch.int32)
        depths, indptr = Part((N,), torch.int32), Part((B + 1,), torch.int32)
        # Behind the extras in the order of `ForwardBatch.tensors`.
        own = (rows, rows, rows, masks, depths, lens, lens, indptr, pages)
        self._parts = (*(part for part, _ in extras), *own)
        self._padding = (*(padding for _, padding in extras), 0, 0, -1, 0, 0, 0, 0, 0)
        self._device = device
        # What comes along with a batch stands right before it, behind free room.
        self.num_bytes = ROOM_BYTES + num_bytes_of(self._parts)
        self._buffer = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        views = views_of(self._buffer[ROOM_BYTES:], self._parts)
        self.extras = views[: len(extras)]
        for view, (_, padding) in zip(self.extras, extras, strict=True):
            view.fill_(padding)
        tokens, positions, kv_rows, ancestors, tree_depths, *of_sequences, page_table = views[len(extras) :]
        kv_rows.fill_(-1)
        context_lens, tree_lens, query_indptr = of_sequences
        self.capacity = capacity
        self.batch = ForwardBatch(
            tokens=tokens,
            positions=positions,
            kv_rows=kv_rows,
            tree=TreeBatch(
                page_table=page_table,
                context_lens=context_lens,
                tree_lens=tree_lens,
                query_indptr=query_indptr,
                ancestors=ancestors,
                depths=tree_depths,
                page_size=page_size,
                # The launch is planned for the largest: one sequence may bring all rows, and all may be long.
                host_context_lens=(capacity.max_keys,) * B,
                host_tree_lens=(0,) * B,
                host_query_lens=(N,) * B,
            ),
        )

    def fill(
        self, batch: ForwardBatch, others: Sequence[Tensor] = (), extras: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Takes in a batch of the host that fits, the first parts of the extras, and other tensors, in one copy that
        is not waited for; returns the others on the device, where they are until the next call."""
        return self.send(self.stage(batch, others, extras))

    def stage(
        self, batch: ForwardBatch, others: Sequence[Tensor] = (), extras: Sequence[Tensor] = ()
    ) -> StagedBytes:
        """What `fill` copies, ready on the host; the device goes on with the batch that it has."""
        assert self.capacity.holds(batch)
        with_them = [Part(tuple(tensor.shape), tensor.dtype) for tensor in others]
        if num_bytes_of(with_them) > ROOM_BYTES:
            return replace(self.stage(batch, extras=extras), apart=others)
        *of_batch, page_table = batch.tensors()
        tensors = [*extras, *of_batch]
        # Of the page table, the last part, only rows of real sequences: nothing looks at the others.
        table = Part((len(page_table), self.capacity.max_pages), torch.int32)
        sent = (*with_them, *self._parts[:-1], table)
        staged = stage(num_bytes_of(sent), self._device)
        views = views_of(staged, sent)
        for target, source in zip(views[: len(others)], others, strict=True):
            target.copy_(source)
        *targets, pages = views[len(others) :]
        for target, source, padding in zip(targets, tensors, self._padding, strict=True):
            target.fill_(padding)
            target[tuple(slice(size) for size in source.shape)] = source
        targets[-1][len(tensors[-1]) :] = batch.tree.num_queries  # query_indptr
        pages[:, : page_table.shape[1]] = page_table
        return StagedBytes(staged, with_them)

    def send(self, staged: StagedBytes) -> list[Tensor]:
        """The rest of `fill`."""
        start = ROOM_BYTES - num_bytes_of(staged.others)
        self._buffer[start : start + len(staged.data)].copy_(staged.data, non_blocking=True)
        if staged.apart:
            return upload(staged.apart, self._device)
        return views_of(self._buffer[start:], staged.others)
