"""Which model a judge was made for: it reads rows that mean something in that model alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outrider.workers.draft_heads.description import source_fingerprint
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.source import WeightSource


@dataclass(frozen=True)
class ModelIdentity:
    """A model, whatever path or name leads to it.

    Attributes:
        model: as its user wrote it; for messages alone.
        hidden_size, num_layers, vocab_size: its sizes.
        fingerprint: of its embedding (`draft_heads.description.fingerprint`): another model, fine-tuning of the
            embedding or quantisation has another one.
        template_sha256: of its chat template, see `template_sha256`.
    """

    model: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    fingerprint: str
    template_sha256: str


def identify(model: str, source: WeightSource, chat_template: str | None) -> ModelIdentity:
    """What a judge made for this model carries, and what a server compares it with.

    Args:
        model: as its user wrote it.
        source: its weights; of them the embedding is looked at (`load_target_tensors(config, [EMBEDDING], …)`).
        chat_template: `tokenizer.chat_template` of what `load_tokenizer` gives.
    """
    config = source.config
    return ModelIdentity(
        model=model,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        fingerprint=source_fingerprint(source),
        template_sha256=template_sha256(chat_template),
    )


def template_sha256(chat_template: str | None) -> str:
    """sha256 of the template's text; "" where there is none."""
    return hashlib.sha256(chat_template.encode()).hexdigest() if chat_template else ""


def differences(what: str, theirs: ModelIdentity, ours: ModelIdentity) -> list[str]:
    """All in which the model of a judge (`theirs`) is not the one that is served, to go into a message."""
    found = [
        f"{name} {a}, not {b}"
        for name, a, b in (
            ("hidden size", theirs.hidden_size, ours.hidden_size),
            ("number of layers", theirs.num_layers, ours.num_layers),
            ("vocabulary", theirs.vocab_size, ours.vocab_size),
        )
        if a != b
    ]
    if not found and theirs.fingerprint != ours.fingerprint:
        found.append("its embedding has other values (another model, or another quantisation of it)")
    if theirs.template_sha256 != ours.template_sha256:
        found.append("another chat template")
    return [f"{what} {theirs.model}: {difference}" for difference in found]


def read_identity(raw: Mapping[str, Any], name: str) -> ModelIdentity:
    """Of an object in judge.json. Raises ValueError naming a field that is not what it may be."""
    fields = Fields(raw, f"{name}.")
    identity = ModelIdentity(
        model=fields.string("model"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_layers"),
        vocab_size=fields.integer("vocab_size"),
        fingerprint=fields.string("fingerprint"),
        template_sha256=fields.string("template_sha256"),
    )
    fields.refuse_unread()
    return identity
