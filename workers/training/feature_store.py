"""What a trainer reads of the target: rows by layer and the law at every position, computed once and kept, or anew.

Kept in safetensors files, each of one kind of row and 256 texts, named by a hash of all that decides what is in it:
a run that goes on, and one of any method with the same target and texts, finds what it shares with earlier ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypedDict, TypeVar

import numpy as np
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.kernels.transfers import upload
from outrider.workers.sequences.segments import places_in, starts_of
from outrider.workers.training.data import TrainingText
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.vocabulary_loss import SoftTargets
from outrider.workers.weights.progress import Progress

_TEXTS_PER_FILE = 256
# Rows whose logits are laid out at once: on a CPU few, which stay near the processor, on a GPU many a launch.
_LOGIT_ROWS = {"cpu": 256, "cuda": 4096}
_LAST = "last"


def _layer_name(layer: int) -> str:
    return f"layer {layer}"


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Texts back to back, N tokens in all, and the target's rows at each of them.

    What decides which rows a loss reads stays on the host, where it is looked at; a device that is asked for it would
    have to finish its work first.

    Attributes:
        lengths: tokens of each text.
        tokens: int64 [N], on the host.
        is_label: bool [N]: a loss may be on guessing this token; on the host.
        greedy: int64 [N], the target's likeliest next token, of all of its vocabulary; on the host.
        taps: [N, taps * hidden], inputs of the tapped layers side by side; no columns where none is asked for.
        normed: [N, hidden], the last rows after the final norm; no columns where they are not asked for.
        soft: the target's law of the next token, over the head's ids.
    """

    lengths: list[int]
    tokens: Tensor
    is_label: Tensor
    greedy: Tensor
    taps: Tensor
    normed: Tensor
    soft: SoftTargets

    @property
    def device(self) -> torch.device:
        """Of the rows."""
        return self.taps.device

    def without_labels(self) -> FeatureBatch:
        """The same, with nothing to learn: for a rank that has no text of its own in a forward."""
        return replace(self, is_label=torch.zeros_like(self.is_label))

    def to(self, device: torch.device) -> FeatureBatch:
        """The same with the rows on another device."""
        soft = SoftTargets(self.soft.columns.to(device), self.soft.log_probs.to(device))
        return replace(self, taps=self.taps.to(device), normed=self.normed.to(device), soft=soft)


@dataclass(frozen=True)
class WantedRows:
    """Which of the target's rows a method reads.

    Attributes:
        taps: layers, whose inputs are read.
        normed: whether the last rows after the final norm are read.
        ids: int64 [V'], over which the target's law is.
        top_k: of that law.
    """

    taps: tuple[int, ...]
    normed: bool
    ids: Tensor
    top_k: int

    @property
    def law_name(self) -> str:
        """Of the law, by what decides it besides the last rows."""
        return f"law {self.top_k} {hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()}"

    @property
    def names(self) -> list[str]:
        """What is read, each kept by itself, so that other methods and other heads find what they share."""
        return [*map(_layer_name, self.taps), *([_LAST] if self.normed else []), self.law_name]

    def bytes_per_token(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Of all that is kept, at most."""
        top_k = min(self.top_k, len(self.ids))
        return (len(self.taps) + 1) * hidden_size * dtype.itemsize + top_k * 6 + 4


class FeatureComputer:
    """Runs the target and keeps what a trainer needs, and the last rows, on the target's device: by name tensors by
    name, [tokens, ...].

    Attributes:
        device: the target's.
    """

    def __init__(self, target: TargetFeatures, wanted: WantedRows) -> None:
        """`target` gives at least the wanted layers and its last rows."""
        self._target = target
        self._wanted = wanted
        self._top_k = min(wanted.top_k, len(wanted.ids))
        self._has_all_ids = len(wanted.ids) == target.model.config.vocab_size
        self.device = target.model.device
        self._ids = wanted.ids.to(self.device)

    def compute(self, texts: Sequence[TrainingText]) -> dict[str, dict[str, Tensor]]:
        """Of texts back to back, in as many forwards as they need."""
        parts: list[dict[str, dict[str, Tensor]]] = []
        batch: list[TrainingText] = []
        num_tokens = 0
        for text in texts:
            if batch and num_tokens + len(text.tokens) > self._target.max_rows:
                parts.append(self._forward(batch))
                batch, num_tokens = [], 0
            batch.append(text)
            num_tokens += len(text.tokens)
        parts.append(self._forward(batch))
        return {
            name: {key: torch.cat([part[name][key] for part in parts]) for key in parts[0][name]}
            for name in parts[0]
        }

    @torch.inference_mode()
    def law(self, normed: Tensor) -> dict[str, Tensor]:
        """Of rows after the final norm, on any device; the law is on the target's."""
        normed = normed.to(self.device)
        parts = [self._law(piece) for piece in normed.split(_LOGIT_ROWS[normed.device.type])]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    @torch.inference_mode()
    def _forward(self, texts: Sequence[TrainingText]) -> dict[str, dict[str, Tensor]]:
        model = self._target.model
        rows = self._target.rows([text.tokens.tolist() for text in texts])
        found = {
            _layer_name(layer): {"rows": torch.cat([by_layer[layer] for by_layer in rows])}
            for layer in self._wanted.taps
        }
        normed = model.normed(torch.cat([by_layer[model.config.num_layers] for by_layer in rows]))
        return {**found, _LAST: {"normed": normed}, self._wanted.law_name: self.law(normed)}

    def _law(self, normed: Tensor) -> dict[str, Tensor]:
        logits = self._target.model.weights.head(normed)
        greedy = logits.argmax(-1)
        if not self._has_all_ids:
            logits = logits.index_select(1, self._ids)
        top, columns = logits.topk(self._top_k, dim=-1)
        log_probs = top - logits.logsumexp(-1, keepdim=True)
        return {
            "greedy": greedy.to(torch.int32),
            "columns": columns.to(torch.int32),
            "log_probs": log_probs.to(torch.float16),
        }


class BatchReader(Protocol):
    """Gives a batch of texts with the target's rows."""

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        """These texts, back to back. At least one."""
        ...


class TokensOnly:
    """For who runs the target itself: no rows, no laws."""

    def __init__(self, texts: Sequence[TrainingText]) -> None:
        self._texts = texts

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        return _batch([self._texts[index] for index in indices], None, [])


class ComputedRows:
    """Runs the target whenever a text is read."""

    def __init__(self, texts: Sequence[TrainingText], wanted: WantedRows, computer: FeatureComputer) -> None:
        self._texts = texts
        self._wanted = wanted
        self._computer = computer

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        texts = [self._texts[index] for index in indices]
        return _batch(texts, self._wanted, [self._computer.compute(texts)])


class HeldRows:
    """Runs the target when a text is read for the first time, and holds its rows in the memory of its device."""

    def __init__(self, texts: Sequence[TrainingText], wanted: WantedRows, computer: FeatureComputer) -> None:
        self._texts = texts
        self._wanted = wanted
        self._computer = computer
        self._lengths = np.array([len(text.tokens) for text in texts])
        self._starts = starts_of(self._lengths)
        self._is_held = np.zeros(len(texts), dtype=bool)
        self._greedy = torch.zeros(int(self._lengths.sum()), dtype=torch.int64)
        self._held: dict[str, Tensor] = {}

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        missing = [index for index in indices if not self._is_held[index]]
        if missing:
            self._hold(missing)
        texts = [self._texts[index] for index in indices]
        rows = self._rows(indices)
        on_device = upload([rows], self._computer.device)[0]
        taps, normed, columns, log_probs = (
            self._held[name].index_select(0, on_device) for name in ("taps", "normed", "columns", "log_probs")
        )
        return FeatureBatch(
            **_on_host(texts),
            greedy=self._greedy[rows],
            taps=taps,
            normed=normed,
            soft=SoftTargets(columns.long(), log_probs.float()),
        )

    def _hold(self, indices: Sequence[int]) -> None:
        texts = [self._texts[index] for index in indices]
        batch = _batch(texts, self._wanted, [self._computer.compute(texts)])
        found = {
            "taps": batch.taps,
            "normed": batch.normed,
            # Narrow, as they were made.
            "columns": batch.soft.columns.int(),
            "log_probs": batch.soft.log_probs.half(),
        }
        if not self._held:
            self._check_space(sum(rows.shape[1] * rows.itemsize for rows in found.values()))
            self._held = {name: self._space(rows) for name, rows in found.items()}
        places = self._rows(indices)
        on_device = upload([places], self._computer.device)[0]
        for name, rows in found.items():
            self._held[name].index_copy_(0, on_device, rows)
        self._greedy[places] = batch.greedy
        self._is_held[indices] = True

    def _check_space(self, bytes_per_token: int) -> None:
        device, size = self._computer.device, len(self._greedy) * bytes_per_token
        free = (
            torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        )
        if size > free:
            raise ValueError(
                f"texts.features must be cached or computed: {size / 1e9:.2f} GB of rows do not fit in the "
                f"{free / 1e9:.2f} GB that are free on {device}"
            )

    def _space(self, rows: Tensor) -> Tensor:
        return rows.new_empty(len(self._greedy), rows.shape[1])

    def _rows(self, indices: Sequence[int]) -> Tensor:
        """int64 [N], where the rows of these texts lie."""
        lengths = self._lengths[indices]
        return torch.from_numpy(self._starts[indices].repeat(lengths) + places_in(lengths))


class FeatureFiles:
    """The rows of some texts in files: of each 256 texts one file for each of `WantedRows.names`."""

    def __init__(self, texts: Sequence[TrainingText], wanted: WantedRows, folder: Path, target: str) -> None:
        """target: what besides texts and layer decides the rows of a layer: model and number format."""
        self._texts = texts
        self._wanted = wanted
        self._files = {name: row_files(texts, folder, f"{target} {name}") for name in {*wanted.names, _LAST}}

    @property
    def num_missing(self) -> int:
        """Tokens of which not everything is kept."""
        return sum(len(text.tokens) for number in self._missing() for text in self._group(number))

    def keep(self, computer: FeatureComputer, progress: Progress) -> None:
        """Computes what is not in its file yet; `progress` is told how many texts are there."""
        for number, names in self._missing().items():
            progress("features of texts", number * _TEXTS_PER_FILE, len(self._texts))
            last = self._files[_LAST][number]
            if names == [self._wanted.law_name] and last.exists():
                # Another head than that of an earlier run: the layers need not be run again.
                computed = {names[0]: computer.law(load_file(last)["normed"])}
            else:
                computed = computer.compute(self._group(number))
            for name, tensors in computed.items():
                if not self._files[name][number].exists():
                    _write(self._files[name][number], tensors)
        progress("features of texts", len(self._texts), len(self._texts))

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        texts = [self._texts[index] for index in indices]
        return _batch(texts, self._wanted, [self._rows(index) for index in indices])

    def _missing(self) -> dict[int, list[str]]:
        missing: dict[int, list[str]] = {}
        for name in self._wanted.names:
            for number, path in enumerate(self._files[name]):
                if not path.exists():
                    missing.setdefault(number, []).append(name)
        return dict(sorted(missing.items()))

    def _group(self, number: int) -> Sequence[TrainingText]:
        return self._texts[number * _TEXTS_PER_FILE : (number + 1) * _TEXTS_PER_FILE]

    def _rows(self, index: int) -> dict[str, dict[str, Tensor]]:
        number, place = divmod(index, _TEXTS_PER_FILE)
        lengths = [len(text.tokens) for text in self._group(number)[: place + 1]]
        rows = slice(sum(lengths[:-1]), sum(lengths))
        found = {}
        for name in self._wanted.names:
            with safe_open(self._files[name][number], framework="pt") as file:
                found[name] = {key: file.get_slice(key)[rows] for key in file.keys()}  # noqa: SIM118
        return found


class Digested(Protocol):
    """A text, or several, that rows are computed of."""

    def digested(self) -> bytes:
        """What of it decides the target's rows."""
        ...


Text = TypeVar("Text", bound=Digested)
AnyText = TypeVar("AnyText", contravariant=True)


class RowComputer(Protocol[AnyText]):
    """Computes what is kept."""

    def compute(self, texts: Sequence[AnyText]) -> list[dict[str, Tensor]]:
        """Of each text its tensors by name, equally long ones each."""
        ...


def row_files(
    texts: Sequence[Digested], folder: Path, identity: str, texts_per_file: int = _TEXTS_PER_FILE
) -> list[Path]:
    """Where the rows of these texts are kept, a file for each `texts_per_file` of them.

    Args:
        identity: what else than texts decides the rows: target, layers, number format, ids.
    """
    starts = range(0, len(texts), texts_per_file)
    parts = [texts[start : start + texts_per_file] for start in starts]
    return [folder / f"{_digest(identity, part)}.safetensors" for part in parts]


def keep_rows(
    texts: Sequence[Text],
    files: Sequence[Path],
    computer: RowComputer[Text],
    progress: Progress,
    texts_per_file: int = _TEXTS_PER_FILE,
) -> None:
    """Computes what is not in its file yet; `progress` is told how many texts are there."""
    for number, path in enumerate(files):
        start = number * texts_per_file
        if not path.exists():
            progress("features of texts", start, len(texts))
            by_text = computer.compute(texts[start : start + texts_per_file])
            _write(path, {name: torch.cat([tensors[name] for tensors in by_text]) for name in by_text[0]})
    progress("features of texts", len(texts), len(texts))


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file({name: values.cpu().contiguous() for name, values in tensors.items()}, unfinished)
    unfinished.replace(path)


def _batch(
    texts: Sequence[TrainingText],
    wanted: WantedRows | None,
    parts: Sequence[Mapping[str, Mapping[str, Tensor]]],
) -> FeatureBatch:
    num_tokens = sum(len(text.tokens) for text in texts)

    def joined(name: str, key: str) -> Tensor:
        return torch.cat([part[name][key] for part in parts]) if parts else torch.empty(num_tokens, 0)

    law = wanted.law_name if wanted else ""
    taps = [joined(_layer_name(layer), "rows") for layer in wanted.taps] if wanted else []
    normed = joined(_LAST, "normed") if wanted and wanted.normed else torch.empty(num_tokens, 0)
    soft = SoftTargets(joined(law, "columns").long(), joined(law, "log_probs").float())
    empty = soft.log_probs.new_empty(num_tokens, 0)
    return FeatureBatch(
        **_on_host(texts),
        greedy=joined(law, "greedy").long().cpu(),
        taps=torch.cat(taps, dim=1) if taps else empty,
        normed=normed if normed.shape[1] else empty,
        soft=soft,
    )


class _OnHost(TypedDict):
    """What a batch has of its texts."""

    lengths: list[int]
    tokens: Tensor
    is_label: Tensor


def _on_host(texts: Sequence[TrainingText]) -> _OnHost:
    learned = [np.arange(len(text.tokens)) >= max(1, text.num_unlearned) for text in texts]
    return {
        "lengths": [len(text.tokens) for text in texts],
        "tokens": torch.from_numpy(np.concatenate([text.tokens for text in texts]).astype(np.int64)),
        "is_label": torch.from_numpy(np.concatenate(learned)),
    }


def _digest(identity: str, texts: Sequence[Digested]) -> str:
    digest = hashlib.sha256(identity.encode())
    for text in texts:
        digest.update(text.digested())
    return digest.hexdigest()[:32]
