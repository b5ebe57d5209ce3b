"""The rows that LM heads read on given texts, and the target's rows of whose law the same guesses are.

A text a b c d e with the prompt a b; labels are c d e. A small LM's rows of b c d guess them, and so do the target's.

- Step k of an unrolled drafter, anchored at position p, guesses the token at p + k + 1, as the target does at p + k:
  see `unrolled`.
- Medusa head h at position t guesses the token at t + h + 2, as the target does at t + h + 1: see `medusa1`.
- Level k of a block with its anchor at position p guesses the token at p + k + 1, as the target does at p + k: see
  `block_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outrider.configs.training import ParallelConfig
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.draft_heads.parallel import ParallelDrafter
from outrider.workers.draft_heads.slim import HeadRows, PairedRows
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.training.block_attention import plan_blocks
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.parallel import ParallelTraining
from outrider.workers.training.texts import DistilledText
from outrider.workers.training.unrolled import Unrolled, rotated
from outrider.workers.training.unrolled_attention import unrolled_attention
from outrider.workers.training.vocabulary_loss import SoftTargets

Progress = Callable[[int], None]
_GROUP = 16  # texts of one call: a progress bar moves


def rows_of_model(
    texts: Sequence[DistilledText], drafter: TargetFeatures, target: TargetFeatures, progress: Progress
) -> list[HeadRows]:
    """Of a small LM, over its own last rows; both models give the rows of their last layer, `layers` (L,)."""
    rows, law_rows = [], []
    for group in _groups(texts):
        tokens = [text.tokens for text in group]
        found = last_rows(drafter, tokens)
        laws = found if target is drafter else last_rows(target, tokens)
        for text, own, law in zip(group, found, laws, strict=True):
            labels = _label_rows(text)
            rows.append(own[labels])
            law_rows.append(law[labels])
        progress(_num_tokens(group))
    joined = torch.cat(rows)
    return [HeadRows(joined, torch.arange(len(joined)), torch.cat(law_rows))]


@torch.no_grad()
def rows_of_medusa(
    texts: Sequence[DistilledText], heads: MedusaHeads, target: TargetFeatures, progress: Progress
) -> list[HeadRows]:
    """Of each LM head of Medusa heads, over what comes out of its blocks.

    `target` gives the rows of its last layer.
    """
    num_heads = heads.shape.num_heads
    rows: list[list[Tensor]] = [[] for _ in range(num_heads)]
    laws: list[list[Tensor]] = [[] for _ in range(num_heads)]
    law_rows, num_laws = [], 0
    for group in _groups(texts):
        for text, normed in zip(group, last_rows(target, [text.tokens for text in group]), strict=True):
            own = normed[_label_rows(text)]
            places = torch.arange(len(own)) + num_laws
            for head, block in enumerate(heads.blocks):
                # Head h guesses what the target says h + 1 places on: the last h + 1 rows guess past the text.
                rows[head].append(block(own[: -head - 1].float()).to(own.dtype))
                laws[head].append(places[head + 1 :])
            law_rows.append(own)
            num_laws += len(own)
        progress(_num_tokens(group))
    shared = torch.cat(law_rows)
    every = range(num_heads)
    of_lm_heads = [list(every)] if heads.shape.shares_lm_head else [[head] for head in every]
    return [
        HeadRows(
            torch.cat([part for head in group for part in rows[head]]),
            torch.cat([part for head in group for part in laws[head]]),
            shared,
        )
        for group in of_lm_heads
    ]


@torch.no_grad()
def rows_of_unrolled(
    texts: Sequence[DistilledText],
    drafter: Unrolled,
    target: TargetFeatures,
    embedding: Tensor,
    num_steps: int,
    progress: Progress,
) -> list[HeadRows]:
    """Of a drafter that is fed back on itself, over its outputs of `num_steps` unrolled steps.

    `target` gives the rows of the drafter's taps and its last layer's; `embedding`: float [V, hidden], the target's.
    """
    rows, laws, law_rows, num_laws = [], [], [], 0
    last = target.model.config.num_layers
    for group in _groups(texts):
        for text, taps in zip(group, target.rows([text.tokens for text in group]), strict=True):
            first, end = _label_rows(text).start, _label_rows(text).stop
            read = torch.cat([taps[tap] for tap in drafter.shape.taps], dim=-1).float()
            outputs = unrolled(drafter, read[:-1], torch.tensor(text.tokens[1:]), embedding, num_steps)
            for step, output in enumerate(outputs):
                # Row r is anchored at position r + 1, so its law is that of position r + 1 + step.
                law = torch.arange(len(output)) + 1 + step
                learned = (law >= first) & (law < end)
                rows.append(drafter.normed(output[learned]).to(taps[last].dtype))
                laws.append(law[learned] - first + num_laws)
            law_rows.append(target.model.normed(taps[last][first:end]).clone())
            num_laws += end - first
        progress(_num_tokens(group))
    return [HeadRows(torch.cat(rows), torch.cat(laws), torch.cat(law_rows))]


@torch.no_grad()
def unrolled(
    drafter: Unrolled, taps: Tensor, tokens: Tensor, embedding: Tensor, num_steps: int
) -> list[Tensor]:
    """A drafter over one text as its training-time test runs it: step 0 from the target's features, each later step
    from the outputs of the one before and the tokens one further.

    A row of step k, anchored at one place, sees step 0 up to its place and of later steps its own place, as far as
    the drafter's window goes.

    Args:
        taps: float32 [T, taps * hidden], the target's; tokens: int64 [T], the token after each.

    Returns:
        By step float32 [T, hidden], before the final norm. The last k rows of step k have read no token of the text.
    """
    layer, T = drafter.model.layers[0], len(tokens)
    rope = RotaryEmbedding(drafter.model, layer.rope, torch.float32, taps.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = (table[:, None] for table in rope(torch.arange(T) + len(keys)))  # [T, 1, D / 2]

        def line(x: Tensor) -> Tensor:  # [T, H or less, D] -> [1, H, T, D]
            return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1)[None]

        keys.append(line(rotated(k, cos, sin)))
        values.append(line(v))
        found = unrolled_attention(
            line(rotated(q, cos, sin)), keys, values, q.shape[-1] ** -0.5, layer.window
        )
        return found[0].transpose(0, 1).flatten(1)

    features, outputs = drafter.features(taps), []
    for _ in range(num_steps):
        features = drafter(embedding[tokens], features, attend)
        outputs.append(features)
        tokens = torch.cat((tokens[1:], tokens[:1]))
    return outputs


@torch.no_grad()
def rows_of_parallel(
    texts: Sequence[DistilledText],
    drafter: ParallelDrafter,
    target: TargetFeatures,
    embedding: Tensor,
    progress: Progress,
) -> list[HeadRows]:
    """Of a parallel drafter, over the levels of blocks at some places of each text, always the same ones; the pair
    term reads the text's own tokens.

    `target` gives the rows of the drafter's taps and its last layer's; `embedding`: float [V, hidden], the target's.
    """
    training = ParallelTraining(drafter, embedding, ParallelConfig(), torch.float32)
    rows, pair_rows, laws, law_rows, num_laws = [], [], [], [], 0
    last = target.model.config.num_layers
    generator = torch.Generator().manual_seed(0)
    for group in _groups(texts):
        found = target.rows([text.tokens for text in group])
        batch = _batch_of(group, [torch.cat([of[tap] for tap in drafter.shape.taps], dim=-1) for of in found])
        blocks = plan_blocks(
            batch.lengths, batch.is_label, training.num_guesses, training.config.anchors, generator
        )
        # Laws are wanted of positions before labels, of which some have none.
        is_law = torch.cat((batch.is_label[1:], batch.is_label[:1]))
        index = is_law.cumsum(0) - 1 + num_laws
        law_rows.append(target.model.normed(torch.cat([of[last] for of in found])[is_law]).clone())
        num_laws += int(is_law.sum())
        places, of_levels = (torch.cat(parts) for parts in zip(*blocks.by_level(), strict=True))
        output = training.rows_of(batch, blocks).flatten(0, 1)[places]
        dtype = law_rows[-1].dtype
        rows.append(output.to(dtype))
        pair_rows.append(drafter.pair_rows(batch.tokens[of_levels], output).to(dtype))
        laws.append(index[of_levels])
        progress(_num_tokens(group))
    shape = drafter.shape
    successors = drafter.pair.successors().reshape(shape.lm_head.num_ids, shape.pair.rank).detach()
    return [
        PairedRows(torch.cat(rows), torch.cat(laws), torch.cat(law_rows), torch.cat(pair_rows), successors)
    ]


def _batch_of(texts: Sequence[DistilledText], taps: Sequence[Tensor]) -> FeatureBatch:
    """Texts back to back for a trainer's module that is asked for no loss; taps: [tokens, taps * hidden] of each."""
    first_labels = [max(1, len(text.prompt_tokens)) for text in texts]
    is_label = [torch.arange(len(rows)) >= first for rows, first in zip(taps, first_labels, strict=True)]
    none = torch.empty(0)
    return FeatureBatch(
        lengths=[len(rows) for rows in taps],
        tokens=torch.tensor([token for text in texts for token in text.tokens]),
        is_label=torch.cat(is_label),
        greedy=none,
        taps=torch.cat(list(taps)),
        normed=none,
        soft=SoftTargets(none, none),
    )


def last_rows(features: TargetFeatures, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of each text [tokens, hidden], as the model's LM head reads them."""
    last = features.model.config.num_layers
    return [features.model.normed(rows[last]).clone() for rows in features.rows(texts)]


def _label_rows(text: DistilledText) -> slice:
    """Positions whose next token is one that the target wrote."""
    first = max(0, len(text.prompt_tokens) - 1)
    return slice(first, max(first, len(text.tokens) - 1))


def _groups(texts: Sequence[DistilledText]) -> list[Sequence[DistilledText]]:
    return [texts[start : start + _GROUP] for start in range(0, len(texts), _GROUP)]


def _num_tokens(texts: Sequence[DistilledText]) -> int:
    return sum(len(text.tokens) for text in texts)
