"""What `outrider slim` does: rows of texts, the target's law over them, and LM heads of low rank fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from outrider.workers.draft_heads.lm_head import LmHead, LowRankLmHead
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.draft_heads.parallel import ParallelDrafter
from outrider.workers.draft_heads.slim import HeadQuality, HeadRows, SlimSettings, fit, quality, slim_start
from outrider.workers.draft_heads.trim import with_head, with_lm_heads
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.head_rows import (
    rows_of_medusa,
    rows_of_model,
    rows_of_parallel,
    rows_of_unrolled,
)
from outrider.workers.training.head_source import (
    HeadCheckpoint,
    HeadKind,
    Heads,
    HeadTexts,
    head_of_model,
    open_heads,
)
from outrider.workers.training.texts import DistilledText
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import ResolvedModel, open_source, read_config, resolve
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM

_ALL = slice(None)

RowReader = Callable[[Sequence[DistilledText]], list[HeadRows]]
"""Texts -> the rows of each LM head."""


@dataclass(frozen=True)
class SlimData:
    """What LM heads are fitted on.

    Attributes:
        checkpoint: what they are of, with full ones.
        teacher: float32 [V', hidden of the teacher], rows of the heads' ids.
        used, held_out: of each LM head, rows to learn from and to measure with.
    """

    checkpoint: HeadCheckpoint
    teacher: Tensor
    used: list[HeadRows]
    held_out: list[HeadRows]


@dataclass(frozen=True)
class SlimmedHead:
    """A fitted LM head.

    Attributes:
        head: of low rank.
        full, start, fitted: the full head, the low-rank one as it starts and as it is fitted, on held-out text.
        num_steps: of the optimizer.
    """

    head: LowRankLmHead
    full: HeadQuality
    start: HeadQuality
    fitted: HeadQuality
    num_steps: int


def read_slim_data(
    kind: HeadKind,
    source: str,
    own_law: bool,
    texts: HeadTexts,
    num_unrolled: int,
    dtype: torch.dtype,
    threads: int,
    cache_dir: Path,
    progress: Progress,
) -> SlimData:
    """Reads texts with the drafter and the target.

    Args:
        source: the drafter; the target is the texts'.
        own_law: the teacher is the drafter's own full head (a small LM's only), not the target.
        num_unrolled: steps of an EAGLE-3 drafter or a head for multi-token prediction.
        dtype: of the models.

    Raises:
        ValueError: something cannot be read, drafter and target do not fit, or the texts are too short.
    """
    target_model = resolve(texts.description.model, cache_dir, progress, "--texts (its target)")
    target = read_config(target_model)
    checkpoint = open_heads(kind, source, texts, target, cache_dir, progress)
    head = checkpoint.lm_heads[0]
    if head.shape.is_low_rank:
        raise ValueError("SOURCE must have a head of full rank; a low-rank one is no start for another")
    total = sum(len(text.tokens) for text in (*texts.used, *texts.held_out))
    done = 0

    def count(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        progress("reading texts", done, total)

    rows: RowReader
    if isinstance(checkpoint.heads, LmHead):
        model = resolve(source, cache_dir, progress, "SOURCE")
        own = _features(model, (), dtype, threads)
        target_rows = own if own_law else _features(target_model, (), dtype, threads)
        rows = partial(rows_of_model, drafter=own, target=target_rows, progress=count)
    else:
        rows = _rows_of_heads(checkpoint.heads, target_model, num_unrolled, dtype, threads, count)
    used, held_out = rows(texts.used), rows(texts.held_out)
    for number, part in (*enumerate(used, start=1), *enumerate(held_out, start=1)):
        if not len(part.rows):
            raise ValueError(
                f"--texts must hold longer answers: there is no token for LM head {number} to guess"
            )
    teacher = head.matrix() if own_law else head_of_model(target_model).matrix()[head.ids]
    return SlimData(checkpoint, teacher.detach(), used, held_out)


def _features(model: ResolvedModel, taps: Sequence[int], dtype: torch.dtype, threads: int) -> TargetFeatures:
    """A model that gives the rows of these layers and of its last one."""
    layers = tuple(dict.fromkeys((*taps, read_config(model).num_layers)))
    return TargetFeatures(open_source(model), layers, dtype, threads)


def _rows_of_heads(
    heads: Heads,
    target_model: ResolvedModel,
    num_unrolled: int,
    dtype: torch.dtype,
    threads: int,
    count: Callable[[int], None],
) -> RowReader:
    """Of heads over a target's rows: all but a model's own."""
    if isinstance(heads, MedusaHeads):
        return partial(
            rows_of_medusa,
            heads=heads,
            target=_features(target_model, (), dtype, threads),
            progress=count,
        )
    assert not isinstance(heads, LmHead)
    target, source = _features(target_model, heads.shape.taps, dtype, threads), open_source(target_model)
    embedding = source.read(EMBEDDING, _ALL, _ALL, torch.float32)
    if isinstance(heads, ParallelDrafter):
        return partial(rows_of_parallel, drafter=heads, target=target, embedding=embedding, progress=count)
    if isinstance(heads, MtpDrafter):
        heads.target_norm = source.read(FINAL_NORM, _ALL, _ALL, torch.float32)
    return partial(
        rows_of_unrolled,
        drafter=heads,
        target=target,
        embedding=embedding,
        num_steps=num_unrolled,
        progress=count,
    )


def slim_heads(
    data: SlimData, settings: SlimSettings, progress: Progress
) -> tuple[HeadCheckpoint, list[SlimmedHead]]:
    """Fits each LM head, and measures it on its held-out rows: the checkpoint with the new heads, and these."""
    lm_heads, slimmed = data.checkpoint.lm_heads, []
    for number, (full, used, held_out) in enumerate(zip(lm_heads, data.used, data.held_out, strict=True)):
        of_heads = f" head {number + 1} of {len(lm_heads)}" if len(lm_heads) > 1 else ""

        def show(done: int, total: int, loss: float, of_heads: str = of_heads) -> None:
            progress(f"distilling{of_heads}, {loss:.2f} nats", done, total)

        slimmed.append(_slimmed(full, used, held_out, data.teacher, settings, show))
    heads, found = data.checkpoint.heads, [one.head for one in slimmed]
    if isinstance(heads, LmHead):
        changed: Heads = found[0]
    elif isinstance(heads, MedusaHeads):
        changed = with_lm_heads(heads, found)
    else:
        changed = with_head(heads, found[0])
    return replace(data.checkpoint, heads=changed), slimmed


def _slimmed(
    full: LmHead,
    used: HeadRows,
    held_out: HeadRows,
    teacher: Tensor,
    settings: SlimSettings,
    show: Callable[[int, int, float], None],
) -> SlimmedHead:
    head = slim_start(full, settings.rank, used.rows)

    def measured(which: LmHead) -> HeadQuality:
        return quality(which, held_out, teacher, settings.batch_rows)

    before, start = measured(full), measured(head)
    num_steps = fit(head, used, teacher, settings, show)
    return SlimmedHead(head, before, start, measured(head), num_steps)
