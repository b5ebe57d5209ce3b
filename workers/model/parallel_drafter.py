"""A parallel drafter over its own paged cache: context rows of known tokens are kept, rows of blocks are scratch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.rope_append import rope_append
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.kernels.tree_attention import tree_attention
from outrider.kernels.tree_batch import TreeBatch
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter
from outrider.workers.model.batch import TreeRows, build_batch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.embedding import Embedding
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import Int64Array, places_in


class CachedParallelDrafter:
    """What a drafter's modules compute, with attention over pages."""

    def __init__(
        self,
        drafter: ParallelDrafter,
        embedding: Embedding,
        cache: PagedCache,
        kernels: KernelSelection = REFERENCES,
    ) -> None:
        """drafter: as `for_serving` gives it; embedding: the target's; cache: of the drafter's model."""
        self.drafter, self.shape, self.model = drafter, drafter.shape, drafter.shape.model
        self.cache = cache
        self.device, self.dtype = cache.kv.device, cache.kv.dtype
        self._embedding = embedding
        self._kernels = kernels
        self._rope = RotaryEmbedding(self.model, self.shape.rope, self.dtype, self.device)

    @torch.inference_mode()
    def features(self, taps: Tensor) -> Tensor:
        """The target's rows [N, taps * target_hidden_size] side by side -> features [N, hidden]."""
        return self.drafter.features(taps.to(self.device, self.dtype))

    @torch.inference_mode()
    def write_context(
        self, tables: PageTables, slots: Int64Array, firsts: Int64Array, counts: Int64Array, features: Tensor
    ) -> None:
        """Writes the rows of known tokens, whose positions are their indices in the text.

        Args:
            slots, firsts, counts: int64 [B], of each sequence the first position and how many.
            features: [sum of counts, hidden].
        """
        at = firsts.repeat(counts) + places_in(counts)
        kv_rows = torch.from_numpy(tables.kv_rows(slots.repeat(counts), at)).to(self.device)
        rotation = self._rope(torch.from_numpy(at).to(self.device))
        for layer in range(self.model.num_layers):
            k, v = self.drafter.context(layer, features)
            pages = self.cache.keys(layer), self.cache.values(layer)
            # There are no queries: the keys stand in for them.
            rope_append(k, k, v, *rotation, kv_rows, *pages, use_kernel=self._kernels.rope_append)

    @torch.inference_mode()
    def blocks(
        self, tables: PageTables, slots: Int64Array, context_lens: Int64Array, anchors: Int64Array
    ) -> Tensor:
        """One forward over a block for each sequence, behind its context rows.

        Args:
            slots, context_lens, anchors: int64 [S]; the last known tokens, whose positions are `context_lens`.

        Returns:
            [S, num_levels, hidden], what the LM head reads.
        """
        size = self.shape.block_size
        tokens = np.full((len(slots), size), self.shape.mask_token_id, dtype=np.int64)
        tokens[:, 0] = anchors
        layers = [self.model.layers[index].window for index in range(self.model.num_layers)]
        trees = {
            own: self._tree(tables, slots, context_lens, tokens.reshape(-1), own)
            for own in dict.fromkeys(self.shape.layers)
        }
        at = context_lens.repeat(size) + np.tile(np.arange(size), len(slots))
        kv_rows = torch.from_numpy(tables.kv_rows(slots.repeat(size), at)).to(self.device)
        rotation = self._rope(torch.from_numpy(at).to(self.device))
        scale = self.model.head_dim**-0.5

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pages = self.cache.keys(layer), self.cache.values(layer)
            q = rope_append(q, k, v, *rotation, kv_rows, *pages, use_kernel=self._kernels.rope_append)
            tree, window = trees[self.shape.layers[layer]], layers[layer]
            use_kernel = self._kernels.tree_attention
            return tree_attention(q, *pages, tree, scale, window, use_kernel=use_kernel).flatten(1)

        read = torch.from_numpy(tokens.reshape(-1)).to(self.device)
        embedded = self._embedding.rows(read, self._kernels.gather_rows)
        return self.drafter(embedded.to(self.device), attend)

    @torch.inference_mode()
    def logits(self, output: Tensor) -> Tensor:
        """Rows [..., hidden] of levels -> float32 [..., V'], without the pair term."""
        return self.drafter.logits(output.flatten(0, -2)).float().unflatten(0, output.shape[:-1])

    @torch.inference_mode()
    def after(self, logits: Tensor, output: Tensor, previous: Int64Array) -> tuple[Tensor, Tensor]:
        """What follows tokens `previous`, int64 [M]; logits [M, V'] and rows [M, hidden] of their levels.

        Returns:
            float32 [M, V'] logits; float32 [M], the log of how often they are right, [0] where nothing tells.
        """
        rows = self.drafter.pair_rows(torch.from_numpy(previous).to(self.device), output)
        told = logits.new_empty(0)
        if self.shape.confidence != "none":
            told = F.logsigmoid(self.drafter.confidence(output, rows))
        return self.drafter.with_pair(logits, rows).float(), told

    def _tree(
        self,
        tables: PageTables,
        slots: Int64Array,
        context_lens: Int64Array,
        tokens: Int64Array,
        layer: BlockLayer,
    ) -> TreeBatch:
        """Blocks as trees: a slot's ancestors are the slots that it sees."""
        size = self.shape.block_size
        places = np.tile(np.arange(size), len(slots))
        seen = np.arange(size) if layer.is_causal else np.full(size, size - 1)
        masks = np.uint64(0xFFFFFFFFFFFFFFFF) >> (63 - seen).astype(np.uint64)
        sizes = np.full(len(slots), size)
        rows = TreeRows(
            slots, context_lens, sizes, sizes, tokens, places, places, np.tile(masks, len(slots))[:, None]
        )
        if layer.window_from_anchor:
            rows = rows._replace(depths=np.zeros_like(places))
        return build_batch(tables, rows, self.device).tree
