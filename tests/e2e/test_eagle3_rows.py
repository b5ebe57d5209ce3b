"""What the EAGLE-3 drafter says inside the server is what its modules say of the whole text at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, default_taps
from outrider.workers.drafting.row_cache import Expansion
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING
from support.drafted import path_of
from support.eagle3_reference import logits_along
from support.equality import Reference, decode
from support.local_engine import LocalEngine
from support.models import random_model
from support.tiny import SLOW_TARGET, VOCAB_SIZE, loop_options, random_tokens, tiny_cases
from support.tiny_heads import building_eagle3, eagle3_drafter, read

EAGLE3 = DraftOptions(("eagle3",), 8, 6)
NUM_LAYERS, PAGE_SIZE = 8, 16
NUM_ROWS = 60  # that are computed again
# One row in a batch of several and the same row alone are summed in another order.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def deep_target() -> WeightSource:
    return open_source(_deep())


@pytest.fixture(scope="module")
def deep_reference() -> Reference:
    return Reference(_deep())


def _deep():  # type: ignore[no-untyped-def]
    return random_model(
        f"hidden_size=32&num_layers={NUM_LAYERS}&num_heads=4&num_kv_heads=2&vocab_size={VOCAB_SIZE}&seed=3"
    )


class Watched:
    """Builds the method and keeps the logits of every expansion, with the text that they follow."""

    def __init__(self, target: WeightSource, drafter: Eagle3Drafter, num_pages: int = 512) -> None:
        build = building_eagle3(target, drafter, num_pages)
        self.rows: list[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]] = []
        self.num_read = self.num_caught_up = 0

        def building(*of):  # type: ignore[no-untyped-def]
            self.method = method = build(*of)
            logits_of, read_known = method._logits, method._read_known

            def watching(
                expansion: Expansion, others: Sequence[torch.Tensor]
            ) -> tuple[torch.Tensor, list[torch.Tensor]]:
                logits, there = logits_of(expansion, others)
                self.num_caught_up += int(expansion.num_catching_up.sum())
                for slot, node, row in zip(expansion.node_slots, expansion.nodes, logits, strict=True):
                    tokens = method.slots.sequence(slot).tokens
                    path = path_of(method.trees, slot, int(node))
                    self.rows.append((tuple(tokens), tuple(path), row.clone()))
                return logits, there

            def reading(rows):  # type: ignore[no-untyped-def]
                self.num_read += len(rows.tokens)
                read_known(rows)

            method._logits, method._read_known = watching, reading
            return method

        self.build = building


def check_rows(watched: Watched, reference: Reference, target: WeightSource, drafter: Eagle3Drafter) -> None:
    """Some of the rows that were seen, the deepest and the latest among them."""
    found = sorted(watched.rows, key=lambda row: (len(row[1]), len(row[0])))
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, NUM_ROWS).astype(int)]
    embedding, taps = read(target, EMBEDDING), drafter.shape.taps
    texts = reference.rows([tokens for tokens, _, _ in chosen], taps)
    for (tokens, path, logits), (hidden, _) in zip(chosen, texts, strict=True):
        expected = logits_along(drafter, embedding, hidden.flatten(1), tokens, path)[-1]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
    watched.rows.clear()


@pytest.mark.parametrize("loop", ["serial, 1 lane", "2 lanes, ahead"])
def test_logits_in_the_server_are_those_of_the_modules_over_the_whole_text(
    deep_target: WeightSource, deep_reference: Reference, loop: str
) -> None:
    """Position by position: after prompts that were read in chunks, verdicts, shared prefixes and recomputation."""
    options = loop_options(loop, True)
    drafter = eagle3_drafter(deep_target, default_taps(NUM_LAYERS))
    watched = Watched(deep_target, drafter)
    system = tuple(random_tokens(100, 3 * PAGE_SIZE + 6))
    cases = tiny_cases()
    with LocalEngine(
        deep_target, options=options, num_pages=24, profile=SLOW_TARGET, methods=(watched.build,)
    ) as engine:
        texts = decode(engine, cases, EAGLE3)
        assert sum(text.stats.num_recomputed for text in texts.values()) > 0
        assert watched.num_read > 0
        assert watched.num_caught_up > 0
        assert max(len(path) for _, path, _ in watched.rows) >= 2
        check_rows(watched, deep_reference, deep_target, drafter)
        shared = [replace(case, prompt=system + case.prompt) for case in cases[:2]]
        texts = decode(engine, shared[:1], EAGLE3) | decode(engine, shared[1:], EAGLE3)
        assert texts[shared[1].id].stats.num_cached_prompt_tokens == 3 * PAGE_SIZE
        watched.rows = [
            row for row in watched.rows if row[0][:-1][: len(shared[1].prompt)] == shared[1].prompt
        ]
        check_rows(watched, deep_reference, deep_target, drafter)
    pool = watched.method._rows.pool
    assert pool.num_available == pool.num_pages


def test_features_are_made_of_the_inputs_of_layers_2_half_and_last_but_two(
    deep_target: WeightSource, deep_reference: Reference
) -> None:
    """Of L = 8 layers these are 2, 4 and 5: transformers' hidden_states[2], [4] and [5], in this order."""
    drafter = eagle3_drafter(deep_target, default_taps(NUM_LAYERS))
    drafter.fc.weight.data.copy_(
        torch.randn(drafter.fc.weight.shape, generator=torch.Generator().manual_seed(2))
    )
    watched, seen = Watched(deep_target, drafter), []
    case = tiny_cases((40,))[0]
    with LocalEngine(deep_target, prefill_chunk=24, methods=(watched.build,)) as engine:
        method = watched.method
        of_taps = method._drafter.features

        def watching(taps: torch.Tensor) -> torch.Tensor:
            seen.append(taps.clone())
            return of_taps(taps)

        method._drafter.features = watching  # type: ignore[method-assign]
        text = decode(engine, [case], EAGLE3)[case.id]
    rows = torch.cat(seen)
    whole = (*case.prompt, *text.tokens)
    (own, _), *_ = deep_reference.rows([whole], (2, 4, 5))
    assert len(rows) >= len(whole) - 1
    assert rows.shape[1] == 3 * 32
    torch.testing.assert_close(rows[: len(whole) - 1], own[:-1].flatten(1), atol=TOLERANCE, rtol=TOLERANCE)
    # The neighbours are told apart by far.
    for wrong in ((1, 4, 5), (3, 4, 5), (2, 3, 5), (2, 5, 5), (2, 4, 4), (2, 4, 6)):
        (other, _), *_ = deep_reference.rows([whole], wrong)
        assert (rows[: len(whole) - 1] - other[:-1].flatten(1)).abs().max() > 100 * TOLERANCE
