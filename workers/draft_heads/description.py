"""What a checkpoint of draft heads says besides its weights: which target it belongs to, and how well it guesses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from outrider.workers.weights.fields import Fields
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING

KEY = "outrider"  # of the description in config.json; other programs' files have none

Template = Literal["chat", "raw", "both", "unknown"]
_TEMPLATES = ("chat", "raw", "both", "unknown")
_NUM_FINGERPRINT_ROWS = 16


@dataclass(frozen=True)
class HeadDescription:
    """What heads were made for. Text "" and numbers 0: the checkpoint does not say.

    Attributes:
        target_model: the target as its user wrote it.
        target_hidden_size, target_num_layers, target_vocab_size: its sizes.
        target_fingerprint: of its embedding, see `fingerprint`.
        template: whether the texts that the heads were trained on had the chat template.
        accuracies: P(the target says the guess of this rank), by head or depth, then by rank; may be empty.
    """

    target_model: str = ""
    target_hidden_size: int = 0
    target_num_layers: int = 0
    target_vocab_size: int = 0
    target_fingerprint: str = ""
    template: Template = "unknown"
    accuracies: tuple[tuple[float, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return asdict(self)

    def or_else(self, other: HeadDescription) -> HeadDescription:
        """With what `other` says where this one says nothing."""
        unsaid = HeadDescription()
        missing = {
            name: value for name, value in vars(other).items() if getattr(self, name) == getattr(unsaid, name)
        }
        return replace(self, **missing)


def read_description(raw: Mapping[str, Any]) -> HeadDescription:
    """Of the object that `HeadDescription.to_json` gave; ValueError names a field that is not what it may be."""
    fields = Fields(raw, f"{KEY}.")
    accuracies = fields.value("accuracies")
    rows = accuracies if isinstance(accuracies, list) else [accuracies]
    if not all(isinstance(row, list) and all(_is_probability(value) for value in row) for row in rows):
        raise fields.wrong("accuracies", "lists of numbers from 0 to 1")
    template: Any = fields.text("template", _TEMPLATES)
    description = HeadDescription(
        target_model=fields.string("target_model"),
        target_hidden_size=fields.integer("target_hidden_size", 0),
        target_num_layers=fields.integer("target_num_layers", 0),
        target_vocab_size=fields.integer("target_vocab_size", 0),
        target_fingerprint=fields.string("target_fingerprint"),
        template=template,
        accuracies=tuple(tuple(float(value) for value in row) for row in rows),
    )
    fields.refuse_unread()
    return description


def fingerprint_ids(vocab_size: int) -> Tensor:
    """int64 [16]: the evenly spread tokens whose embedding rows stand for a model."""
    last = _NUM_FINGERPRINT_ROWS - 1
    return torch.arange(_NUM_FINGERPRINT_ROWS) * (vocab_size - 1) // last


def fingerprint(rows: Tensor) -> str:
    """sha256 of the embedding rows [16, hidden] of `fingerprint_ids`, as float32: two targets differ in it."""
    return hashlib.sha256(rows.detach().float().contiguous().cpu().numpy().tobytes()).hexdigest()


def source_fingerprint(source: WeightSource) -> str:
    """`fingerprint` of a model, of whose weights the embedding is looked at."""
    return fingerprint(source.read_rows(EMBEDDING, fingerprint_ids(source.config.vocab_size), torch.float32))


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
