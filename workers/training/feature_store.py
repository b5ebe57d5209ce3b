"""What a trainer reads of the target: rows by layer and the law at every position, computed once and kept, or anew.

Kept in one safetensors file per 256 texts, named by a hash of all that decides what is in it; a run that goes on, and
another one with the same target, texts and ids, finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from outrider.workers.training.data import TrainingText
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.vocabulary_loss import SoftTargets
from outrider.workers.weights.progress import Progress

_TEXTS_PER_FILE = 256
_FORWARD_TOKENS = 4096
_LOGIT_ROWS = 256


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Texts back to back, N tokens in all, and the target's rows at each of them.

    Attributes:
        lengths: tokens of each text.
        tokens: int64 [N].
        is_label: bool [N]: a loss may be on guessing this token.
        taps: [N, taps * hidden], inputs of the tapped layers side by side; no columns where none is asked for.
        normed: [N, hidden], the last rows after the final norm; no columns where they are not asked for.
        greedy: int64 [N], the target's likeliest next token, of all of its vocabulary.
        soft: the target's law of the next token, over the head's ids.
    """

    lengths: list[int]
    tokens: Tensor
    is_label: Tensor
    taps: Tensor
    normed: Tensor
    greedy: Tensor
    soft: SoftTargets

    def without_labels(self) -> FeatureBatch:
        """The same, with nothing to learn: for a rank that has no text of its own in a forward."""
        return replace(self, is_label=torch.zeros_like(self.is_label))

    def to(self, device: torch.device) -> FeatureBatch:
        """The same on another device."""
        return FeatureBatch(
            self.lengths,
            self.tokens.to(device),
            self.is_label.to(device),
            self.taps.to(device),
            self.normed.to(device),
            self.greedy.to(device),
            SoftTargets(self.soft.columns.to(device), self.soft.log_probs.to(device)),
        )


class FeatureComputer:
    """Runs the target and keeps what a trainer needs."""

    def __init__(
        self, target: TargetFeatures, taps: Sequence[int], wants_normed: bool, ids: Tensor, top_k: int
    ) -> None:
        """`target` gives at least the layers `taps` and its last rows; ids: int64 [V'], those of the head."""
        self._target = target
        self._taps = tuple(taps)
        self._wants_normed = wants_normed
        self._ids = ids
        self._top_k = min(top_k, len(ids))
        config = target.model.config
        self._has_all_ids = len(ids) == config.vocab_size
        width = len(self._taps) * config.hidden_size + (config.hidden_size if wants_normed else 0)
        self.bytes_per_token = width * target.model.dtype.itemsize + self._top_k * 6 + 4

    def compute(self, texts: Sequence[TrainingText]) -> list[dict[str, Tensor]]:
        """Of each text its tensors by name, [tokens, ...] each; in forwards over some thousand tokens."""
        found: list[dict[str, Tensor]] = []
        batch: list[TrainingText] = []
        num_tokens = 0
        for text in texts:
            if batch and num_tokens + len(text.tokens) > _FORWARD_TOKENS:
                found += self._forward(batch)
                batch, num_tokens = [], 0
            batch.append(text)
            num_tokens += len(text.tokens)
        return found + self._forward(batch) if batch else found

    @torch.inference_mode()
    def _forward(self, texts: Sequence[TrainingText]) -> list[dict[str, Tensor]]:
        model = self._target.model
        rows = self._target.rows([text.tokens.tolist() for text in texts])
        last = torch.cat([by_layer[model.config.num_layers] for by_layer in rows])
        normed = model.normed(last)
        law = [self._law(normed[start : start + _LOGIT_ROWS]) for start in range(0, len(normed), _LOGIT_ROWS)]
        named = {name: torch.cat([part[name] for part in law]) for name in ("greedy", "columns", "log_probs")}
        if self._wants_normed:
            named["normed"] = normed
        lengths = [len(text.tokens) for text in texts]
        split = {name: values.split(lengths) for name, values in named.items()}
        return [
            {name: parts[index] for name, parts in split.items()}
            | ({"taps": torch.cat([rows[index][layer] for layer in self._taps], dim=1)} if self._taps else {})
            for index in range(len(texts))
        ]

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
        return _batch([self._texts[index] for index in indices], [])


class ComputedRows:
    """Runs the target whenever a text is read."""

    def __init__(self, texts: Sequence[TrainingText], computer: FeatureComputer) -> None:
        self._texts = texts
        self._computer = computer

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        texts = [self._texts[index] for index in indices]
        return _batch(texts, self._computer.compute(texts))


class KeptRows:
    """Reads what `keep_rows` wrote."""

    def __init__(self, texts: Sequence[TrainingText], files: Sequence[Path]) -> None:
        self._texts = texts
        self._files = files

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        return _batch([self._texts[index] for index in indices], [self._rows(index) for index in indices])

    def _rows(self, index: int) -> dict[str, Tensor]:
        number = index // _TEXTS_PER_FILE
        lengths = [len(text.tokens) for text in self._texts[number * _TEXTS_PER_FILE : index + 1]]
        rows = slice(sum(lengths[:-1]), sum(lengths))
        with safe_open(self._files[number], framework="pt") as file:
            return {name: file.get_slice(name)[rows] for name in file.keys()}  # noqa: SIM118


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
            path.parent.mkdir(parents=True, exist_ok=True)
            progress("features of texts", start, len(texts))
            by_text = computer.compute(texts[start : start + texts_per_file])
            joined = {name: torch.cat([tensors[name] for tensors in by_text]) for name in by_text[0]}
            unfinished = path.with_suffix(".tmp")
            save_file({name: values.contiguous() for name, values in joined.items()}, unfinished)
            unfinished.replace(path)
    progress("features of texts", len(texts), len(texts))


def _batch(texts: Sequence[TrainingText], tensors: Sequence[dict[str, Tensor]]) -> FeatureBatch:
    lengths = [len(text.tokens) for text in texts]

    def joined(name: str) -> Tensor:
        if not tensors or name not in tensors[0]:
            return torch.empty(sum(lengths), 0)
        return torch.cat([by_name[name] for by_name in tensors])

    tokens = torch.cat([torch.from_numpy(text.tokens).long() for text in texts])
    return FeatureBatch(
        lengths=lengths,
        tokens=tokens,
        is_label=torch.cat([torch.arange(len(text.tokens)) >= max(1, text.num_unlearned) for text in texts]),
        taps=joined("taps"),
        normed=joined("normed"),
        greedy=joined("greedy").long(),
        soft=SoftTargets(joined("columns").long(), joined("log_probs").float()),
    )


def _digest(identity: str, texts: Sequence[Digested]) -> str:
    digest = hashlib.sha256(identity.encode())
    for text in texts:
        digest.update(text.digested())
    return digest.hexdigest()[:32]
