"""What `outrider slim` does: rows of texts, a teacher over them, a head of low rank fitted to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.lm_head import LmHead, LowRankLmHead
from outrider.workers.draft_heads.slim import (
    HeadQuality,
    SlimSettings,
    Teacher,
    fit,
    quality,
    slim_start,
)
from outrider.workers.draft_heads.trim import with_head
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.head_rows import HeadRows, rows_of_eagle3, rows_of_model
from outrider.workers.training.head_source import (
    HeadKind,
    Heads,
    HeadTexts,
    head_of_model,
    lm_head_of,
    open_heads,
)
from outrider.workers.training.texts import DistilledText
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import open_source, read_config, resolve
from outrider.workers.weights.tensors import EMBEDDING

_ALL = slice(None)


@dataclass(frozen=True)
class SlimData:
    """What a head is fitted on.

    Attributes:
        heads: what the head is of.
        description: of it.
        teacher_head: float32 [V', hidden of the teacher], rows of the head's ids.
        used, held_out: rows to learn from and to measure with.
    """

    heads: Heads
    description: HeadDescription
    teacher_head: Tensor
    used: HeadRows
    held_out: HeadRows

    @property
    def head(self) -> LmHead:
        """The full head."""
        return lm_head_of(self.heads)


@dataclass(frozen=True)
class Slimmed:
    """A fitted head.

    Attributes:
        heads: what it is of, with it.
        head: alone.
        full, start, fitted: the full head, the low-rank one as it starts and as it is fitted, on held-out text.
        num_steps: of the optimizer.
    """

    heads: Heads
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
        num_unrolled: steps of an EAGLE-3 drafter.
        dtype: of the models.

    Raises:
        ValueError: something cannot be read, or drafter and target do not fit.
    """
    target_model = resolve(texts.description.model, cache_dir, progress, "--texts (its target)")
    target = read_config(target_model)
    heads, description = open_heads(kind, source, target, cache_dir, progress)
    head = lm_head_of(heads)
    if head.shape.is_low_rank:
        raise ValueError("SOURCE must have a head of full rank; a low-rank one is no start for another")
    if isinstance(heads, Eagle3Drafter):
        layers = tuple(dict.fromkeys((*heads.shape.taps, target.num_layers)))
        target_source = open_source(target_model)
        features = TargetFeatures(target_source, layers, dtype, threads)
        embedding = target_source.read(EMBEDDING, _ALL, _ALL, torch.float32)
        drafter = heads

        def rows(part: Sequence[DistilledText]) -> HeadRows:
            return rows_of_eagle3(part, drafter, features, embedding, num_unrolled, count)
    else:
        model = resolve(source, cache_dir, progress, "SOURCE")
        own = TargetFeatures(open_source(model), (read_config(model).num_layers,), dtype, threads)
        teacher = (
            own
            if own_law
            else TargetFeatures(open_source(target_model), (target.num_layers,), dtype, threads)
        )

        def rows(part: Sequence[DistilledText]) -> HeadRows:
            return rows_of_model(part, own, teacher, count)

    total = sum(len(text.tokens) for text in (*texts.used, *texts.held_out))
    done = 0

    def count(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        progress("reading texts", done, total)

    used, held_out = rows(texts.used), rows(texts.held_out)
    teacher_head = head.matrix() if own_law else head_of_model(target_model).matrix()[head.ids]
    return SlimData(heads, description, teacher_head.detach(), used, held_out)


def slim_heads(data: SlimData, settings: SlimSettings, progress: Progress) -> Slimmed:
    """Fits a head of low rank, and measures it on the held-out rows."""
    head = slim_start(data.head, settings.rank, data.used.rows)
    held_out = _teacher(data, data.held_out)

    def measured(which: LmHead) -> HeadQuality:
        return quality(which, data.held_out.rows, held_out, settings.batch_rows)

    full, start = measured(data.head), measured(head)
    num_steps = 0

    def show(done: int, total: int, loss: float) -> None:
        nonlocal num_steps
        num_steps = done
        progress(f"distilling, {loss:.2f} nats", done, total)

    fit(head, data.used.rows, _teacher(data, data.used), settings, show)
    heads = with_head(data.heads, head) if isinstance(data.heads, Eagle3Drafter) else head
    return Slimmed(heads, head, full, start, measured(head), num_steps)


def _teacher(data: SlimData, rows: HeadRows) -> Teacher:
    @torch.no_grad()
    def logits(index: Tensor) -> Tensor:
        return rows.law_rows[rows.laws[index]].float() @ data.teacher_head.T

    return logits
