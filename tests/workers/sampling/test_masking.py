"""Rows lose the tokens that they may not choose, in any vocabulary and on any number of shards, and get them back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outrider.kernels.shard_ids import ShardIds
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.sampling.confinement import Confinement, add, remove
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.grammars import Grammars, GrammarState, no_texts
from outrider.workers.sampling.masking import mask_rows
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange
from support.confined import TINY_GRAMMARS, TINY_VOCABULARY, confined, forbidden

VOCABULARY = 100  # not a multiple of the bits in a word


def words_of(*sets: list[int]) -> np.ndarray:
    words = np.zeros((len(sets), -(-VOCABULARY // 32)), dtype=np.int32)
    for row, tokens in enumerate(sets):
        add(words[row], np.array(tokens))
    return words


def rows_of(params: SamplingParams, words: np.ndarray, num: int) -> SampledRows:
    return SampledRows(params, np.arange(num), PenaltyState(()), allowed=words)


@pytest.mark.parametrize("ids", [range(100), range(37, 80), range(1, 100, 3)])
def test_the_others_are_removed_and_come_back(ids: range) -> None:
    logits = torch.randn(4, len(ids))
    before = logits.clone()
    allowed = [[0, 31, 32, 40, 64, 99], [63, 79]]
    groups = [
        rows_of(SamplingParams(), np.empty((0, 0), dtype=np.int32), 1),
        rows_of(SamplingParams(), words_of(*allowed), 2),
        rows_of(SamplingParams(), np.empty((0, 0), dtype=np.int32), 1),
    ]
    masked = mask_rows(logits, groups, ShardIds(torch.tensor(list(ids))))
    kept = torch.tensor([[True] * len(ids), *[[i in row for i in ids] for row in allowed], [True] * len(ids)])
    assert torch.equal(logits, torch.where(kept, before, -torch.inf))
    masked.undo(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.2}, {"temperature": 0.0}]
)
@pytest.mark.parametrize("vocab_size", [VOCABULARY, 20_000])
def test_a_sample_is_that_of_the_few_tokens_alone(truncation: dict[str, float], vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(40, vocab_size, generator=generator)
    few = sorted(set(torch.randint(0, vocab_size, (12,), generator=generator).tolist()))
    params = SamplingParams(**{"seed": 3, **truncation})
    words = np.zeros((40, -(-vocab_size // 32)), dtype=np.int32)
    for row in words:
        add(row, np.array(few))
    solo = SoloCommunicator()
    whole = Sampler(vocab_size, VocabularyRange(0, vocab_size), solo)
    sampled = whole.sample(logits, [rows_of(params, words, 40)])
    removed = torch.full_like(logits, -torch.inf)
    removed[:, few] = logits[:, few]
    none = np.empty((0, 0), dtype=np.int32)
    assert sampled.valid.all()
    assert torch.equal(sampled.tokens, whole.sample(removed, [rows_of(params, none, 40)]).tokens)
    assert set(sampled.tokens.tolist()) <= set(few)
    ids, log_probs = whole.propose(logits, [rows_of(params, words, 40)], 20)
    assert torch.equal(ids[:, 0], sampled.tokens)
    assert set(ids[log_probs > -torch.inf].tolist()) <= set(few)
    nothing = whole.sample(logits, [rows_of(params, np.zeros_like(words), 40)])
    assert not nothing.valid.any()


def test_sets_gain_and_lose_tokens() -> None:
    words = words_of([3, 31, 32])[0]
    remove(words, np.array([31, 31, 99]))
    assert (words == words_of([3, 32])[0]).all()


def test_paths_are_followed_and_left_again() -> None:
    sampling = confined(SamplingParams(max_tokens=9), {"regex": "[a-f]{3}x?"})
    letters = {char: TINY_GRAMMARS.texts.tokens.index(char.encode()) for char in "abcdefx"}
    a, b, x = (letters[char] for char in "abx")
    paths = [[], [a], [a, b], [b, b, a], [b, b, a, x], [a]]
    confinement = Confinement(sampling, TINY_GRAMMARS)

    def agree(output: list[int]) -> None:
        bits = np.unpackbits(confinement.words(paths).view(np.uint8), axis=1, bitorder="little")
        for path, row in zip(paths, bits, strict=True):
            wanted = ~forbidden(sampling, [*output, *path], TINY_VOCABULARY)
            assert row[:TINY_VOCABULARY].astype(bool).tolist() == wanted.tolist(), path

    agree([])
    assert confinement.num_allowed([a], [b, a, x, x]) == 3
    assert confinement.num_allowed([a, b, a], [2, 2]) == 1  # an end, and nothing behind it
    assert confinement.num_allowed([a], [2]) == 0
    confinement.advance([b])
    paths[:] = [[], [a], [a, a], [a, b, x]]
    agree([b])


def test_what_nobody_took_does_not_end_a_text() -> None:
    """The library's matcher keeps an error for good; the state goes on without it."""
    state = GrammarState(TINY_GRAMMARS, confined(SamplingParams(), {"regex": "[a-f]{3}"}).grammar.text)
    a = TINY_GRAMMARS.texts.tokens.index(b"a")
    state.advance([a])
    state._matcher.consume_token(TINY_VOCABULARY - 1)
    assert state._matcher.is_error()
    assert state.num_allowed([a], [a, a]) == 1


def test_a_least_length_needs_no_grammar() -> None:
    sampling = SamplingParams(min_tokens=2, stop_token_ids=(5, 40))
    confinement = Confinement(sampling, Grammars(VOCABULARY, no_texts))
    words = confinement.words([[], [1], [1, 1]])
    for row, has_ends in zip(words, (False, False, True), strict=True):
        other = row.copy()
        remove(other, np.array([5, 40]))
        assert (other != row).any() == has_ends
    assert confinement.num_allowed([], [1, 5, 1]) == 1
    confinement.advance([7, 7])
    assert len(confinement.words([[]])) == 0
