"""Whether a checkpoint of draft heads belongs to the target that is served: the wrong one drafts at chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from outrider.workers.draft_heads.description import HeadDescription, source_fingerprint
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.source import WeightSource

T = TypeVar("T")


def read_for(field: str, read: Callable[[], T]) -> T:
    """What `read` gives of a checkpoint; its ValueErrors begin with the key that names the heads."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def check_target(
    field: str, description: HeadDescription, hidden_size: int, vocab_size: int, target: ModelConfig
) -> None:
    """Refuses heads that were made for a model of another shape.

    Args:
        field: the key that names the heads, for the message.
        hidden_size, vocab_size: of the target, as the heads' own tensors have them.

    Raises:
        ValueError: one line with all that is different.
    """
    compared = (
        ("hidden size", hidden_size, target.hidden_size),
        ("vocabulary", vocab_size, target.vocab_size),
        ("hidden size", description.target_hidden_size or target.hidden_size, target.hidden_size),
        ("vocabulary", description.target_vocab_size or target.vocab_size, target.vocab_size),
        ("number of layers", description.target_num_layers or target.num_layers, target.num_layers),
    )
    differences = [f"{what} {theirs}, not {ours}" for what, theirs, ours in compared if theirs != ours]
    if differences:
        raise ValueError(
            f"{field} must be made for the target, got heads of {_name(description)}: "
            f"{'; '.join(dict.fromkeys(differences))}"
        )


def check_fingerprint(field: str, description: HeadDescription, embedding: WeightSource) -> None:
    """Refuses heads that were made for a model with another embedding, as a ValueError, where they tell of it."""
    if not description.target_fingerprint:
        return
    if source_fingerprint(embedding) != description.target_fingerprint:
        raise ValueError(
            f"{field} must be made for the target, got heads of {_name(description)}, whose embedding has other "
            "values: another model, or another quantisation of it"
        )


def _name(description: HeadDescription) -> str:
    return description.target_model or "a target that they do not name"
