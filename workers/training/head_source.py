"""Checkpoints with LM heads to trim or slim, a model's own or a drafter's, and the texts to do it by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from outrider.workers.draft_heads.checkpoint import (
    read_eagle3,
    read_medusa,
    read_mtp,
    read_parallel,
    write_eagle3,
    write_lm_head,
    write_medusa,
    write_mtp,
    write_parallel_as,
)
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.layouts.eagle3 import Eagle3Layout
from outrider.workers.draft_heads.lm_head import DenseLmHead, LmHead
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.draft_heads.parallel import ParallelDrafter
from outrider.workers.draft_heads.trim import trimmed, trimmed_drafter, trimmed_medusa
from outrider.workers.training.lines import Description
from outrider.workers.training.texts import DistilledText, load_description, read_texts
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import (
    ResolvedModel,
    open_tensors,
    read_config,
    resolve_description,
    resolve_head,
    resolve_tensors,
)
from outrider.workers.weights.source import head_name
from outrider.workers.weights.tensors import HEAD

HeadKind = Literal["model", "eagle3", "medusa", "mtp", "parallel"]
Heads = LmHead | Eagle3Drafter | MedusaHeads | MtpDrafter | ParallelDrafter
_ALL = slice(None)


@dataclass(frozen=True)
class HeadTexts:
    """What a target wrote.

    Attributes:
        description: what wrote it.
        used: texts to count or to learn from.
        held_out: the last tenth, to measure with.
        digest: SHA-256 of all their tokens, hexadecimal.
    """

    description: Description
    used: list[DistilledText]
    held_out: list[DistilledText]
    digest: str

    @property
    def num_tokens(self) -> int:
        """Output tokens of the used texts."""
        return sum(len(text.output_tokens) for text in self.used)


def read_head_texts(directories: Sequence[str], max_tokens: int) -> HeadTexts:
    """Reads folders of `outrider distill`.

    Args:
        max_tokens: end after so many output tokens; 0: all.

    Raises:
        ValueError: a folder without texts, or texts of two targets.
    """
    folders = [Path(directory).expanduser() for directory in directories]
    if not folders:
        raise ValueError("--texts must name at least one folder that `outrider distill` wrote")
    descriptions = [load_description(folder) for folder in folders]
    for folder, other in zip(folders, descriptions, strict=True):
        if (other.vocab_size, other.tokenizer) != (descriptions[0].vocab_size, descriptions[0].tokenizer):
            raise ValueError(f"--texts must be of one target, got another tokenizer in {folder}")
    texts: list[DistilledText] = []
    digest, num_tokens = hashlib.sha256(), 0
    for folder in folders:
        for text in read_texts(folder):
            if max_tokens and num_tokens >= max_tokens:
                break
            if text.output_tokens:
                texts.append(text)
                num_tokens += len(text.output_tokens)
                digest.update(np.array(text.tokens, dtype=np.int64).tobytes())
    num_held_out = max(1, len(texts) // 10)
    if len(texts) < 2:
        raise ValueError(f"--texts must hold at least 2 texts with answers, got {len(texts)}")
    return HeadTexts(descriptions[0], texts[:-num_held_out], texts[-num_held_out:], digest.hexdigest())


def end_ids_of(texts: HeadTexts, cache_dir: Path, progress: Progress) -> tuple[ModelConfig, tuple[int, ...]]:
    """The target that wrote texts, and the ids that may end one. Fetches no weights."""
    resolved = resolve_description(texts.description.model, cache_dir, progress, "--texts (its target)")
    config = read_config(resolved)
    ends = {text.output_tokens[-1] for text in (*texts.used, *texts.held_out) if text.finish_reason == "stop"}
    return config, tuple(sorted(ends | set(config.eos_token_ids)))


@dataclass(frozen=True)
class HeadCheckpoint:
    """What is trimmed or slimmed.

    Attributes:
        heads: in float32; a model's LM head stands alone. An LM head that is the target's is there as well.
        description: what they were made for.
        folder: what they were read from.
    """

    heads: Heads
    description: HeadDescription
    folder: Path

    @property
    def lm_heads(self) -> list[LmHead]:
        """Of the same sizes and ids: one, or of Medusa heads that do not share it one of each."""
        if isinstance(self.heads, LmHead):
            return [self.heads]
        if isinstance(self.heads, MedusaHeads):
            return [head for head in self.heads.lm_heads if isinstance(head, LmHead)]
        return [self.heads.lm_head]


def open_heads(
    kind: HeadKind, source: str, texts: HeadTexts, target: ModelConfig, cache_dir: Path, progress: Progress
) -> HeadCheckpoint:
    """Reads a checkpoint.

    Args:
        source: for "model" what `draft.model` may be, else what `draft.eagle3.model` may be.
        texts, target: what the heads are for, and what wrote that.

    Raises:
        ValueError: it cannot be read, or is for another target.
    """
    written_by = texts.description.model
    if kind == "model":
        resolved = resolve_tensors(source, (HEAD,), cache_dir, progress, "SOURCE")
        head = head_of_model(resolved)
        described = HeadDescription(written_by, target_vocab_size=len(head.ids))
        heads: Heads = head
        folder = resolved.path
    else:
        folder = resolve_head(source, progress, "SOURCE")
        heads, described = _read_heads(kind, folder, target)
        described = replace(described, target_model=described.target_model or written_by)
        if described.target_hidden_size != target.hidden_size:
            raise ValueError(
                f"SOURCE must be for the target of the texts, whose rows have {target.hidden_size} columns, got "
                f"{described.target_hidden_size}"
            )
        if described.target_num_layers not in (0, target.num_layers):
            raise ValueError(
                f"SOURCE must be for the target of the texts, which has {target.num_layers} layers, got "
                f"{described.target_num_layers}"
            )
    if described.target_vocab_size != target.vocab_size:
        raise ValueError(
            f"SOURCE must have the vocabulary of the target of the texts, {target.vocab_size} tokens, got "
            f"{described.target_vocab_size}"
        )
    if isinstance(heads, MtpDrafter | ParallelDrafter) and heads.shares_lm_head:
        shared = head_of_model(
            resolve_tensors(written_by, (HEAD,), cache_dir, progress, "--texts (its target)")
        )
        rows = shared.weight.detach()[heads.lm_head.ids]
        heads.lm_head.load_state_dict({"weight": rows}, assign=True)
    return HeadCheckpoint(heads, described, folder)


def _read_heads(kind: HeadKind, folder: Path, target: ModelConfig) -> tuple[Heads, HeadDescription]:
    match kind:
        case "eagle3":
            return read_eagle3(folder, target.num_layers)
        case "mtp":
            return read_mtp(folder)
        case "parallel":
            return read_parallel(folder)
        case _:
            return read_medusa(folder)


def head_of_model(resolved: ResolvedModel) -> DenseLmHead:
    """A model's LM head, in float32."""
    source = open_tensors(resolved, (HEAD,))
    head = DenseLmHead(source.config.hidden_size, torch.arange(source.config.vocab_size))
    with torch.no_grad():
        head.weight.copy_(source.read(head_name(source), _ALL, _ALL, torch.float32))
    return head


def trimmed_heads(checkpoint: HeadCheckpoint, ids: Tensor) -> HeadCheckpoint:
    """The same with LM heads of these ids, as far as they have them. Raises ValueError for too few of them."""
    heads = checkpoint.heads
    kept = ids[torch.isin(ids, checkpoint.lm_heads[0].ids)]
    if isinstance(heads, ParallelDrafter) and heads.shape.pair.top_k > len(kept):
        raise ValueError(
            f"--size must be at least {heads.shape.pair.top_k}, the tokens that the drafter's selector chooses from, "
            f"got {len(kept)}"
        )
    if isinstance(heads, LmHead):
        return replace(checkpoint, heads=trimmed(heads, kept))
    if isinstance(heads, MedusaHeads):
        return replace(checkpoint, heads=trimmed_medusa(heads, kept))
    return replace(checkpoint, heads=trimmed_drafter(heads, kept))


def write_heads(folder: Path, checkpoint: HeadCheckpoint, dtype: torch.dtype) -> None:
    """Writes a checkpoint of the kind: an LM head alone, an EAGLE-3 drafter, Medusa heads as vLLM lays them out, a
    head for multi-token prediction as DeepSeek does, a parallel drafter as the one that was read."""
    heads, description = checkpoint.heads, checkpoint.description
    if isinstance(heads, LmHead):
        write_lm_head(folder, heads, description, dtype)
    elif isinstance(heads, Eagle3Drafter):
        # SpecForge has no word for the target's embedding.
        layout: Eagle3Layout = "speculators" if 0 in heads.shape.taps else "specforge"
        write_eagle3(folder, heads, description, layout, dtype)
    elif isinstance(heads, MtpDrafter):
        write_mtp(folder, heads, description, "deepseek", dtype)
    elif isinstance(heads, ParallelDrafter):
        write_parallel_as(folder, heads, description, checkpoint.folder, dtype)
    else:
        write_medusa(folder, heads, description, "vllm", dtype)
