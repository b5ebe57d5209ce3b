"""The rows that LM heads are fitted on: which token is whose, on texts written out; and what a server computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.draft_heads.pairs import NO_PAIR, PairShape
from outrider.workers.draft_heads.slim import PairedRows
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.draft_heads import for_serving
from outrider.workers.model.embedding import MatrixEmbedding
from outrider.workers.model.feature_drafter import CachedDrafter
from outrider.workers.model.shard import ShardPlan
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.training import head_rows
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.head_rows import rows_of_medusa, rows_of_parallel, rows_of_unrolled
from outrider.workers.training.texts import DistilledText
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.tensors import EMBEDDING
from support.parallel_reference import block_output, logits_after
from support.rows import SequenceRows, batch_of, chain
from support.tiny_heads import mtp_drafter, parallel_drafter, read
from support.training import MELLUM

# Capitals are the target's own.
TEXTS = ["abCDEF", "uvwXY", "gH"]
FOLLOWING = {before: after for text in TEXTS for before, after in pairwise(text)}


def written(prompt: Sequence[int], output: Sequence[int]) -> DistilledText:
    return DistilledText("0", tuple(prompt), tuple(output), 0.0, False, "tiny", "length")


@pytest.fixture(autouse=True)
def _two_texts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_rows, "_GROUP", 2)


class Letters:
    """A target whose one row at each token is the token."""

    model: Any = SimpleNamespace(config=SimpleNamespace(num_layers=1), normed=lambda rows: rows)

    def rows(self, texts: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
        return [{1: torch.tensor(text, dtype=torch.float32)[:, None]} for text in texts]


@pytest.mark.parametrize("shares", [False, True])
def test_rows_of_medusa_heads(shares: bool) -> None:
    """As in the picture in medusa1.py: "token read -> token guessed"."""
    texts = [
        written(
            [ord(letter) for letter in text if letter.islower()],
            [ord(letter) for letter in text if letter.isupper()],
        )
        for text in TEXTS
    ]
    # Fresh blocks hand on what they read.
    heads = MedusaHeads(MedusaShape(1, 100, 4, 1, LmHeadShape(1, 100, 1), shares), torch.arange(100))
    target: Any = Letters()
    found = [
        [
            f"{chr(int(read))}->{FOLLOWING[chr(int(law))]}"
            for read, law in zip(part.rows, part.law_rows[part.laws], strict=True)
        ]
        for part in rows_of_medusa(texts, heads, target, lambda tokens: None)
    ]
    by_head = [["b->D", "C->E", "D->F", "w->Y"], ["b->E", "C->F"], ["b->F"], []]
    assert found == ([[guess for head in by_head for guess in head]] if shares else by_head)


@torch.inference_mode()
def test_rows_of_a_head_for_multi_token_prediction_are_those_of_a_server_past_its_window() -> None:
    target, num_steps = open_source(MELLUM), 3
    drafter, embedding = mtp_drafter(target), read(target, EMBEDDING)
    window = drafter.model.layers[0].window
    assert window == 6
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 160, (length,), generator=generator).tolist() for length in (14, 10, 5)]
    features = TargetFeatures(target, drafter.shape.taps, torch.float32, 1)
    (found,) = rows_of_unrolled(
        [written(tokens[:4], tokens[4:]) for tokens in texts],
        drafter,
        features,
        embedding,
        num_steps,
        lambda count: None,
    )

    own = drafter.model
    cache = PagedCache(own, ShardPlan(own, 0, 1), 8, 4, torch.float32, torch.device("cpu"))
    served = CachedDrafter(
        for_serving(mtp_drafter(target), 160, torch.float32, torch.device("cpu"), packed=True),
        MatrixEmbedding(embedding, VocabularyRange(0, 160)),
        cache,
    )
    rows, laws = [], []
    for tokens in texts:
        normed = features.model.normed(features.rows([tokens])[0][4])
        last = len(tokens) - 1
        for step in range(num_steps):
            for anchor in range(max(1, 3 - step), last - step):
                # A server that knows the text up to the anchor: the target has seen all before it.
                known = SequenceRows([3, 1, 4, 0, 5], 0, chain(anchor), 0, tokens[1 : anchor + 1])
                output = served.forward(batch_of([known], 4, torch.device("cpu")), normed[:anchor])[-1:]
                for token in range(anchor + 1, anchor + step + 1):
                    more = SequenceRows([3, 1, 4, 0, 5], token - 1, [0], 0, [tokens[token]])
                    output = served.forward(batch_of([more], 4, torch.device("cpu")), output)
                rows.append(output)
                laws.append(normed[anchor + step])  # whose next token is guessed: one of the target's own
    torch.testing.assert_close(found.rows, torch.cat(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.law_rows[found.laws], torch.stack(laws), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("pair", [NO_PAIR, PairShape("markov", 8), PairShape("gated", 8)])
def test_rows_of_a_parallel_drafter_are_those_of_a_server(pair: PairShape) -> None:
    target = RandomSource("random:llama?num_layers=4&hidden_size=64&vocab_size=160")
    drafter = parallel_drafter(target, (1, 3), block_size=3, pair=pair, num_ids=50)
    embedding, generator = read(target, EMBEDDING), torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 160, (length,), generator=generator).tolist() for length in (8, 6, 7)]
    first_label = 4
    features = TargetFeatures(target, (1, 3, 4), torch.float32, 1)
    (found,) = rows_of_parallel(
        [written(tokens[:first_label], tokens[first_label:]) for tokens in texts],
        drafter,
        features,
        embedding,
        lambda count: None,
    )
    rows, logits, laws = [], [], []
    for group in (texts[:2], texts[2:]):
        for level, tokens in ((level, tokens) for level in range(3) for tokens in group):
            by_layer = features.rows([tokens])[0]
            taps, normed = torch.cat((by_layer[1], by_layer[3]), dim=1), features.model.normed(by_layer[4])
            for anchor in range(first_label - 1, len(tokens) - 1 - level):
                path = tokens[anchor + 1 : anchor + level + 1]
                rows.append(block_output(drafter, embedding, taps[:anchor], tokens[anchor])[level])
                logits.append(logits_after(drafter, embedding, taps, tokens[: anchor + 1], path))
                laws.append(normed[anchor + level])
    torch.testing.assert_close(found.rows, torch.stack(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.law_rows[found.laws], torch.stack(laws), atol=1e-5, rtol=1e-5)
    assert isinstance(found, PairedRows)
    own = found.logits(drafter.lm_head, torch.arange(len(rows)))
    torch.testing.assert_close(own, torch.stack(logits), atol=1e-4, rtol=1e-4)
