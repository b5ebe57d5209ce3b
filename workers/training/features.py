"""The target's hidden rows of whole texts: computed many texts at a time, for a trainer at once or into files.

`TargetFeatures` is the target alone in one process, reading known text; the tokens of a text need not be its own.
`keep_features` writes its rows beside distilled texts, in `hidden-00000.safetensors`, `hidden-00001.safetensors`, …:
one tensor [rows, hidden] per layer, texts back to back, and in the file's metadata where each text lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.draft_heads.eagle3 import default_taps
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.batch import TreeRows, ancestor_masks, build_batch, depths_of, num_mask_words
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.segments import Int64Array, places_in, starts_of
from outrider.workers.training.texts import DistilledText
from outrider.workers.weights.source import WeightSource

Item = TypeVar("Item")
CPU = torch.device("cpu")
_PAGE = 16
# Rows of one forward: enough that a pass over the weights, or on a GPU the launches of its kernels, are cheap beside
# the products; more only cost memory.
_MAX_ROWS = {"cpu": 2048, "cuda": 16_384}
_SHARD_BYTES = 64 << 20  # what a pass that is cut off loses, and what a trainer waits for


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
        for packed in _groups(trees, lambda tree: len(tree.tokens), self.max_rows):
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


def parse_layers(wanted: str, num_layers: int) -> tuple[int, ...]:
    """Layers by what they are for (`medusa`, `eagle3`: with the last rows, of which the target's law is made), or
    comma-separated.

    Raises:
        ValueError: something else, or a layer that the target does not have.
    """
    if wanted == "medusa":
        return (num_layers,)
    if wanted == "eagle3" and num_layers > 3:
        return (*default_taps(num_layers), num_layers)
    parts = [part.strip() for part in wanted.split(",")]
    layers = tuple(int(part) for part in parts if part.isdecimal())
    if len(layers) < len(parts) or len(set(layers)) < len(layers) or max(layers) > num_layers:
        raise ValueError(
            f"--keep-hidden must be medusa, eagle3 (of a target with more than 3 layers) or different layers from 0 "
            f"to {num_layers} such as 2,15, got {wanted!r}"
        )
    return layers


@dataclass(frozen=True)
class _Shard:
    """One file of rows: where each text lies in it, [first row, number of rows]."""

    path: Path
    layers: tuple[int, ...]
    dtype: str
    places: Mapping[str, tuple[int, int]]


def keep_features(
    features: TargetFeatures,
    texts: Iterable[DistilledText],
    directory: Path,
    dtype: torch.dtype,
    progress: Callable[[int], None],
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes the rows of those texts that no file has yet. A pass that ended anywhere goes on behind its last file.

    Args:
        dtype: of the rows in the files.
        progress: called with the tokens of texts whose rows are in a file.

    Raises:
        ValueError: the files there hold other layers or another dtype.
    """
    shards = _shards(directory)
    name = str(dtype).removeprefix("torch.")
    for shard in shards:
        if shard.layers != features.layers:
            theirs, ours = (",".join(map(str, layers)) for layers in (shard.layers, features.layers))
            raise ValueError(f"--keep-hidden must be {theirs} as in {shard.path}, got {ours}")
        if shard.dtype != name:
            raise ValueError(f"--hidden-dtype must give {shard.dtype} as in {shard.path}, got {name}")
    kept = set().union(*(shard.places for shard in shards))
    missing = (text for text in texts if text.id not in kept)
    row_bytes = hidden_bytes(1, features.layers, features.model.config.hidden_size, dtype)
    groups = _groups(missing, lambda text: len(text.tokens), shard_bytes // row_bytes)
    for number, group in enumerate(groups, start=len(shards)):
        rows = features.rows([text.tokens for text in group])
        tensors = {
            str(layer): torch.cat([of_text[layer] for of_text in rows]).to("cpu", dtype)
            for layer in features.layers
        }
        first, places = 0, {}
        for text in group:
            places[text.id] = (first, len(text.tokens))
            first += len(text.tokens)
        path = directory / f"hidden-{number:05d}.safetensors"
        unfinished = path.with_suffix(".tmp")
        said = {"layers": list(features.layers), "dtype": name, "places": places}
        save_file(tensors, unfinished, metadata={"outrider": json.dumps(said)})
        unfinished.replace(path)
        progress(first)


def kept_tokens(directory: Path) -> int:
    """Tokens whose rows are in files already."""
    return sum(count for shard in _shards(directory) for _, count in shard.places.values())


def hidden_bytes(num_tokens: int, layers: Sequence[int], hidden_size: int, dtype: torch.dtype) -> int:
    """Size of the rows of so many tokens."""
    return num_tokens * len(layers) * hidden_size * dtype.itemsize


class FeatureReader:
    """Rows that `keep_features` wrote.

    Attributes:
        layers: those whose rows are there.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ValueError where there are none, or a file is damaged."""
        shards = _shards(directory)
        if not shards:
            raise ValueError(
                f"{directory} must hold hidden rows: `outrider distill` writes them with --keep-hidden"
            )
        self.layers = shards[0].layers
        self._places = {
            text_id: (shard, place) for shard in shards for text_id, place in shard.places.items()
        }
        self._files: dict[Path, Any] = {}

    def rows(self, text_id: str) -> dict[int, Tensor]:
        """By layer [tokens, hidden], prompt and output, in the files' dtype. Raises ValueError for an unknown id."""
        if text_id not in self._places:
            raise ValueError(f"no hidden rows are kept of the text {text_id!r}")
        shard, (first, count) = self._places[text_id]
        if shard.path not in self._files:
            self._files[shard.path] = safe_open(shard.path, framework="pt")
        file = self._files[shard.path]
        return {layer: file.get_slice(str(layer))[first : first + count] for layer in shard.layers}


def _shards(directory: Path) -> list[_Shard]:
    shards = []
    for path in sorted(directory.glob("hidden-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads(file.metadata()["outrider"])
            shards.append(_Shard(path, tuple(said["layers"]), said["dtype"], said["places"]))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no hidden rows of ours: {error!r}") from error
    return shards


def _groups(items: Iterable[Item], size: Callable[[Item], int], max_size: int) -> Iterator[list[Item]]:
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
