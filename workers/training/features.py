"""The target's hidden rows of whole texts, computed many texts at a time.

`TargetFeatures` is the target alone in one process, reading known text; the tokens of a text need not be its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.batch import TreeRows, ancestor_masks, build_batch, depths_of, num_mask_words
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import Int64Array, places_in, starts_of
from outrider.workers.weights.source import WeightSource

Item = TypeVar("Item")
CPU = torch.device("cpu")
_PAGE = 16
# Rows of one forward: enough that a pass over the weights, or on a GPU the launches of its kernels, are cheap beside
# the products; more only cost memory.
_MAX_ROWS = {"cpu": 2048, "cuda": 16_384}


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Texts with a common beginning, each token of which stands once.

    Attributes:
        tokens: int64 [T], token ids.
        parents: int64 [T], the node before each; parents come first, the root is its own.
    """

    tokens: Int64Array
    parents: Int64Array


def chain(tokens: Sequence[int]) -> TokenTree:
    """One text."""
    return TokenTree(np.asarray(tokens, dtype=np.int64), np.maximum(np.arange(len(tokens)) - 1, 0))


class TargetFeatures:
    """The target in this process, reading texts.

    Attributes:
        layers: whose rows are given, numbered as in `Hidden`: the rows that ENTER them; the number of layers stands
            for those that leave the last one, before the final norm.
        model: the target.
        max_rows: of one forward, about.
    """

    def __init__(
        self,
        source: WeightSource,
        layers: Sequence[int],
        dtype: torch.dtype,
        threads: int,
        device: torch.device = CPU,
        kernels: KernelSelection = REFERENCES,
    ) -> None:
        """Loads the whole target in `dtype`.

        Args:
            threads: torch's CPU threads in this process from now on.
            kernels: which CUDA kernels to run, see `select_kernels`.

        Raises:
            ValueError: a layer that the target does not have.
        """
        config = source.config
        for layer in layers:
            if not 0 <= layer <= config.num_layers:
                raise ValueError(f"layers must be in [0, {config.num_layers}], got {layer}")
        torch.set_num_threads(threads)
        self._plan = ShardPlan(config, 0, 1)
        weights = load_weights(self._plan, source, dtype, device, packed=device.type == "cpu")
        self.layers = tuple(layers)
        self.max_rows = _MAX_ROWS[device.type]
        self.model = Transformer(weights, SoloCommunicator(), kernels)
        self._cache = self._cache_of(self.max_rows // _PAGE)

    def rows(self, texts: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
        """Of each text, at least one token long, its rows by layer: [tokens, hidden] in the target's dtype.

        Ordinary tensors on the target's device, each with memory of its own.
        """
        return self.tree_rows([chain(text) for text in texts])

    def tree_rows(self, trees: Sequence[TokenTree]) -> list[dict[int, Tensor]]:
        """Of each tree of texts its rows by layer: [nodes, hidden], as `rows` gives them."""
        found: list[dict[int, Tensor]] = []
        for packed in in_groups(trees, lambda tree: len(tree.tokens), self.max_rows):
            found += self._forward(packed)
        return found

    def _forward(self, trees: Sequence[TokenTree]) -> list[dict[int, Tensor]]:
        lens = np.array([len(tree.tokens) for tree in trees])
        assert lens.min() > 0, "an empty text has no rows"
        num_pages = -(-lens // _PAGE)
        if num_pages.sum() > self._cache.num_pages:
            self._cache = self._cache_of(int(num_pages.sum()))
        tables = PageTables(len(trees), _PAGE)
        for slot, first in enumerate(starts_of(num_pages).tolist()):
            tables.append(slot, np.arange(first, first + num_pages[slot]))
        places = places_in(lens)
        parents = np.concatenate([tree.parents for tree in trees]) + starts_of(lens).repeat(lens)
        ancestors = ancestor_masks(parents, places, num_mask_words(lens))
        rows = TreeRows(
            slots=np.arange(len(trees)),
            context_lens=np.zeros_like(lens),
            tree_lens=lens,
            query_lens=lens,
            tokens=np.concatenate([tree.tokens for tree in trees]),
            tree_rows=places,
            depths=depths_of(ancestors),
            ancestors=ancestors,
        )
        batch = build_batch(tables, rows, self.model.device)
        taps = self.model.forward(batch, self._cache, self.layers).taps
        split = {layer: taps[layer].split(lens.tolist()) for layer in self.layers}
        # What inference mode made, no graph may keep; a copy made outside of it is an ordinary tensor.
        return [{layer: split[layer][index].clone() for layer in self.layers} for index in range(len(trees))]

    def _cache_of(self, num_pages: int) -> PagedCache:
        model = self.model
        return PagedCache(model.config, self._plan, num_pages, _PAGE, model.dtype, model.device)


def in_groups(items: Iterable[Item], size: Callable[[Item], int], max_size: int) -> Iterator[list[Item]]:
    """Items in their order, as many at a time as come to `max_size` together, one at least."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > max_size:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group
