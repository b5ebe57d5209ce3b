"""The target's hidden rows in files beside the texts that it wrote.

`keep_features` writes them, in `hidden-00000.safetensors`, `hidden-00001.safetensors`, …: one tensor [rows, hidden]
per layer, texts back to back, and in the file's metadata where each text lies. `KeptRows` reads them for a trainer,
which then runs no layer of the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.kernels.rms_norm import rms_norm
from outrider.workers.draft_heads.eagle3 import default_taps
from outrider.workers.model.loader import load_head
from outrider.workers.model.shard import ShardPlan
from outrider.workers.training.computed_rows import TargetLaw
from outrider.workers.training.data import TrainingText
from outrider.workers.training.feature_batch import LAST, FeatureBatch, WantedRows, joined, layer_name
from outrider.workers.training.features import TargetFeatures, in_groups
from outrider.workers.training.texts import DistilledText, load_description
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.safetensors_writer import write_tensors
from outrider.workers.weights.source import WeightSource

_SHARD_BYTES = 64 << 20  # what a pass that is cut off loses


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
    groups = in_groups(missing, lambda text: len(text.tokens), shard_bytes // row_bytes)
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
        said = {"layers": list(features.layers), "dtype": name, "places": places}
        write_tensors(path, tensors, {"outrider": json.dumps(said)})
        progress(first)


def kept_tokens(directory: Path) -> int:
    """Tokens whose rows are in files already."""
    return sum(count for shard in _shards(directory) for _, count in shard.places.values())


def hidden_bytes(num_tokens: int, layers: Sequence[int], hidden_size: int, dtype: torch.dtype) -> int:
    """Size of the rows of so many tokens."""
    return num_tokens * len(layers) * hidden_size * dtype.itemsize


class KeptFiles:
    """Rows that `keep_features` wrote, in one folder.

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

    def num_rows(self, text_id: str) -> int:
        """Tokens of a text that have rows."""
        return self._places[text_id][1][1] if text_id in self._places else 0

    def rows(self, text_id: str, layers: Sequence[int], count: int) -> dict[int, Tensor]:
        """By layer [count, hidden], of the first tokens of a text, prompt and output, in the files' dtype; `count` is
        at most its `num_rows`."""
        shard, (first, num_rows) = self._places[text_id]
        assert count <= num_rows, (text_id, count, num_rows)
        if shard.path not in self._files:
            self._files[shard.path] = safe_open(shard.path, framework="pt")
        file = self._files[shard.path]
        return {layer: file.get_slice(str(layer))[first : first + count] for layer in layers}


def kept_files(
    texts: Sequence[TrainingText], taps: Sequence[int], model: str, config: ModelConfig
) -> dict[Path, KeptFiles]:
    """Rows of all of these texts, by their folders: those that enter the `taps`, and the last ones.

    model: the target as the configuration names it. Raises ValueError naming `texts.features` where rows of a text or
    of a layer are missing, or are another target's.
    """
    try:
        files = {folder: KeptFiles(folder) for folder in dict.fromkeys(text.folder for text in texts)}
        for folder, there in files.items():
            written_by = load_description(folder)
            if (written_by.model, written_by.vocab_size) != (model, config.vocab_size):
                raise ValueError(f"{folder} holds rows of {written_by.model}, target.model is {model}")
            missing = [str(layer) for layer in (*taps, config.num_layers) if layer not in there.layers]
            if missing:
                layers = ", ".join(map(str, there.layers))
                raise ValueError(f"{folder} holds rows of layers {layers}, none of {', '.join(missing)}")
        for text in texts:
            if files[text.folder].num_rows(text.id) < len(text.tokens):
                raise ValueError(
                    f"{text.folder} holds no rows of text {text.id!r}: the command that wrote the texts writes "
                    "those that are missing"
                )
    except ValueError as error:
        raise ValueError(f"texts.features must be cached, computed or held: {error}") from error
    return files


class KeptRows:
    """Reads what `outrider distill --keep-hidden` kept of texts; of the target only the end is run, its final norm
    and its LM head."""

    def __init__(
        self,
        texts: Sequence[TrainingText],
        wanted: WantedRows,
        source: WeightSource,
        model: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """model: the target as the configuration names it, whose weights are in `source`; dtype, device: of the rows
        that are given. Raises ValueError as `kept_files`."""
        config = source.config
        self._texts = texts
        self._wanted = wanted
        self._last = config.num_layers
        self._files = kept_files(texts, wanted.taps, model, config)
        self._dtype = dtype
        self._device = device
        plan = ShardPlan(config, 0, 1)
        self._final_norm, head = load_head(plan, source, dtype, device, packed=device.type == "cpu")
        self._eps = config.rms_norm_eps
        self._law = TargetLaw(head, wanted, device)

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        texts = [self._texts[index] for index in indices]
        layers = tuple(dict.fromkeys((*self._wanted.taps, self._last)))
        rows = [self._rows(text, layers) for text in texts]
        by_layer = {layer: torch.cat([of_text[layer] for of_text in rows]) for layer in layers}
        normed = self._normed(by_layer[self._last])
        found = {layer_name(layer): {"rows": by_layer[layer]} for layer in self._wanted.taps}
        law = self._law(normed)
        return joined(texts, self._wanted, [{**found, LAST: {"normed": normed}, self._wanted.law_name: law}])

    def normed(self, index: int) -> Tensor:
        """[tokens, hidden], the last rows of a text after the final norm."""
        return self._normed(self._rows(self._texts[index], (self._last,))[self._last])

    def _rows(self, text: TrainingText, layers: Sequence[int]) -> dict[int, Tensor]:
        kept = self._files[text.folder].rows(text.id, layers, len(text.tokens))
        return {layer: rows.to(self._device, self._dtype) for layer, rows in kept.items()}

    def _normed(self, rows: Tensor) -> Tensor:
        return rms_norm(rows, self._final_norm, self._eps)


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
