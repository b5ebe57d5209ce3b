"""Trained drafters as checkpoints, and back as a start: the one place that knows which layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from outrider.workers.draft_heads.checkpoint import (
    read_eagle3,
    read_medusa,
    read_mtp,
    read_parallel,
    write_eagle3,
    write_medusa,
    write_mtp,
    write_parallel,
)
from outrider.workers.draft_heads.description import (
    HeadDescription,
    Template,
    source_fingerprint,
)
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.draft_heads.parallel import ParallelDrafter
from outrider.workers.training.data import Corpus
from outrider.workers.weights.source import WeightSource

Drafter = Eagle3Drafter | MedusaHeads | MtpDrafter | ParallelDrafter


def describe(
    target_model: str,
    source: WeightSource,
    corpus: Corpus,
    accuracies: tuple[tuple[float, ...], ...],
) -> HeadDescription:
    """What a checkpoint says besides its weights."""
    config = source.config
    templates = {text.template for text in corpus.training}
    template: Template = "both" if len(templates) == 2 else "chat" if templates == {True} else "raw"
    return HeadDescription(
        target_model=target_model,
        target_hidden_size=config.hidden_size,
        target_num_layers=config.num_layers,
        target_vocab_size=config.vocab_size,
        target_fingerprint=source_fingerprint(source),
        template=template,
        accuracies=accuracies,
    )


def save_drafter(folder: Path, drafter: Drafter, description: HeadDescription) -> None:
    """Writes a checkpoint in bfloat16: in SpecForge's layout, DeepSeek's, our own of parallel drafters, or vLLM's of
    Medusa, which knows heads that share their LM head."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(drafter, Eagle3Drafter):
        write_eagle3(folder, drafter, description, "specforge", torch.bfloat16)
    elif isinstance(drafter, MtpDrafter):
        write_mtp(folder, drafter, description, "deepseek", torch.bfloat16)
    elif isinstance(drafter, ParallelDrafter):
        write_parallel(folder, drafter, description, torch.bfloat16)
    else:
        write_medusa(folder, drafter, description, "vllm", torch.bfloat16)


def start_from(folder: Path, drafter: Drafter) -> None:
    """Gives a drafter the weights of a checkpoint, all but an LM head of another kind or with other ids.

    Raises ValueError where anything else has other sizes.
    """
    found: Drafter
    if isinstance(drafter, Eagle3Drafter):
        found, _ = read_eagle3(folder)
        same_ids = torch.equal(found.lm_head.ids, drafter.lm_head.ids)
    elif isinstance(drafter, ParallelDrafter):
        found, _ = read_parallel(folder)
        same_ids = torch.equal(found.lm_head.ids, drafter.lm_head.ids) and not found.shares_lm_head
    elif isinstance(drafter, MtpDrafter):
        found, _ = read_mtp(folder)
        same_ids = torch.equal(found.lm_head.ids, drafter.lm_head.ids) and not found.shares_lm_head
    else:
        found, _ = read_medusa(folder)
        same_ids = torch.equal(found.ids, drafter.ids)
    ours, theirs = drafter.state_dict(), found.state_dict()
    if not same_ids or _sizes(ours, in_head=True) != _sizes(theirs, in_head=True):
        theirs = {name: value for name, value in theirs.items() if not _is_of_head(name)}
        theirs |= {name: value for name, value in ours.items() if _is_of_head(name)}
    different = _sizes(ours).items() ^ _sizes(theirs).items()
    if different:
        names = ", ".join(sorted({name for name, _ in different}))
        raise ValueError(f"start_from must be a drafter of this run's shape; {folder} differs in {names}")
    drafter.load_state_dict(theirs)


def _is_of_head(name: str) -> bool:
    return "lm_head" in name


def _sizes(weights: Mapping[str, Tensor], in_head: bool = False) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if not in_head or _is_of_head(name)}
