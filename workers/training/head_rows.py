"""The rows that an LM head reads on given texts, and the target's rows of whose law the same guesses are.

A text a b c d e with the prompt a b; labels are c d e. A small LM's rows of b c d guess them, and so do the target's.
An EAGLE-3 drafter's step k, anchored at position p, guesses the token at p + k + 1, as the target does at p + k: see
`unrolled`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.texts import DistilledText
from outrider.workers.training.unrolled import rotated

Progress = Callable[[int], None]
_GROUP = 16  # texts of one call: a progress bar moves


class HeadRows:
    """What a head is fitted on.

    Attributes:
        rows: [N, hidden], as the head reads them.
        laws: int64 [N], of each the index into `law_rows`.
        law_rows: [M, hidden of the target], as the target's head reads them.
    """

    def __init__(self, rows: Sequence[Tensor], laws: Sequence[Tensor], law_rows: Sequence[Tensor]) -> None:
        self.rows, self.laws, self.law_rows = (
            torch.cat(list(rows)),
            torch.cat(list(laws)),
            torch.cat(list(law_rows)),
        )


def rows_of_model(
    texts: Sequence[DistilledText], drafter: TargetFeatures, target: TargetFeatures, progress: Progress
) -> HeadRows:
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
        progress(sum(len(text.tokens) for text in group))
    return HeadRows(rows, [torch.arange(sum(map(len, rows)))], law_rows)


@torch.no_grad()
def rows_of_eagle3(
    texts: Sequence[DistilledText],
    drafter: Eagle3Drafter,
    target: TargetFeatures,
    embedding: Tensor,
    num_steps: int,
    progress: Progress,
) -> HeadRows:
    """Of a drafter, over its outputs of `num_steps` unrolled steps.

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
                rows.append(drafter.norm(output[learned]).to(taps[last].dtype))
                laws.append(law[learned] - first + num_laws)
            law_rows.append(target.model.normed(taps[last][first:end]).clone())
            num_laws += end - first
        progress(sum(len(text.tokens) for text in group))
    return HeadRows(rows, laws, law_rows)


@torch.no_grad()
def unrolled(
    drafter: Eagle3Drafter, taps: Tensor, tokens: Tensor, embedding: Tensor, num_steps: int
) -> list[Tensor]:
    """A drafter over one text as its training-time test runs it: step 0 from the target's features, each later step
    from the outputs of the one before and the tokens one further.

    A row of step k, anchored at one place, sees step 0 up to its place and of later steps its own place.

    Args:
        taps: float32 [T, taps * hidden], the target's; tokens: int64 [T], the token after each.

    Returns:
        By step float32 [T, hidden], before the final norm. The last k rows of step k have read no token of the text.
    """
    shape, T = drafter.shape, len(tokens)
    rope = RotaryEmbedding(shape, shape.rope, torch.float32, taps.device)
    causal, own = torch.ones(T, T, dtype=torch.bool).tril(), torch.eye(T, dtype=torch.bool)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step = len(keys)
        cos, sin = (table[:, None] for table in rope(torch.arange(T) + step))  # [T, 1, D / 2]
        keys.append(rotated(k, cos, sin))
        values.append(v)
        seen = torch.cat([causal] + [own] * step, dim=1)  # [T, T * (step + 1)]
        queries, all_keys, all_values = (
            x.transpose(0, 1)[None] for x in (rotated(q, cos, sin), torch.cat(keys), torch.cat(values))
        )
        out = F.scaled_dot_product_attention(queries, all_keys, all_values, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    features, outputs = drafter.features(taps), []
    for _ in range(num_steps):
        features = drafter(embedding[tokens], features, attend)
        outputs.append(features)
        tokens = torch.cat((tokens[1:], tokens[:1]))
    return outputs


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
