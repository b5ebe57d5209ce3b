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
from outrider.workers.draft_heads.parallel import SUCCESSOR_ROWS, ParallelDrafter
from outrider.workers.training.data import Corpus
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import resolve_head
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


def start_from(checkpoint: str, drafter: Drafter, num_layers: int) -> None:
    """Gives a drafter the weights of a checkpoint, all but an LM head of another kind or with other ids.

    What a pair term has for each id is taken of the ids that both have.

    Args:
        checkpoint: a folder, `shipped:NAME` or a Hugging Face id.
        num_layers: of the target, for files that do not name their taps.

    Raises:
        ValueError: names start_from; it cannot be read, or anything else has other sizes.
    """
    folder = resolve_head(checkpoint, silent, "start_from")
    try:
        found = _read_as(drafter, folder, num_layers)
    except ValueError as error:
        raise ValueError(f"start_from: {error}") from error
    ids, own_ids = _ids_of(found), _ids_of(drafter)
    is_targets = isinstance(found, MtpDrafter | ParallelDrafter) and found.shares_lm_head
    ours, theirs = drafter.state_dict(), found.state_dict()
    for name in SUCCESSOR_ROWS:
        if name in ours and name in theirs and ours[name].shape[1] == theirs[name].shape[1]:
            theirs[name] = _rows_by_id(ours[name], own_ids, theirs[name], ids)
    same_head = _sizes(ours, in_head=True) == _sizes(theirs, in_head=True) and torch.equal(ids, own_ids)
    if is_targets or not same_head:
        theirs = {name: value for name, value in theirs.items() if not _is_of_head(name)}
        theirs |= {name: value for name, value in ours.items() if _is_of_head(name)}
    different = _sizes(ours).items() ^ _sizes(theirs).items()
    if different:
        names = ", ".join(sorted({name for name, _ in different}))
        raise ValueError(f"start_from must be a drafter of this run's shape; {folder} differs in {names}")
    drafter.load_state_dict(theirs)


def _read_as(drafter: Drafter, folder: Path, num_layers: int) -> Drafter:
    """A checkpoint of the same kind."""
    match drafter:
        case Eagle3Drafter():
            return read_eagle3(folder, num_layers)[0]
        case ParallelDrafter():
            return read_parallel(folder)[0]
        case MtpDrafter():
            return read_mtp(folder)[0]
    return read_medusa(folder)[0]


def _ids_of(drafter: Drafter) -> Tensor:
    return drafter.ids if isinstance(drafter, MedusaHeads) else drafter.lm_head.ids


def _rows_by_id(ours: Tensor, own_ids: Tensor, theirs: Tensor, ids: Tensor) -> Tensor:
    """`ours` [V', r], with the rows of `theirs` [V'', r] for the ids that both have."""
    rows, known = ours.clone(), torch.isin(own_ids, ids)
    rows[known] = theirs[torch.searchsorted(ids, own_ids[known])]
    return rows


def _is_of_head(name: str) -> bool:
    return "lm_head" in name


def _sizes(weights: Mapping[str, Tensor], in_head: bool = False) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if not in_head or _is_of_head(name)}
