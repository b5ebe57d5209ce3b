"""Which tokens a trimmed head keeps, and that rows go with their ids."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outrider.workers.draft_heads.checkpoint import (
    read_mtp,
    read_parallel,
    write_mtp,
    write_parallel_as,
)
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.draft_heads.pairs import NO_PAIR, PairShape
from outrider.workers.draft_heads.parallel import ParallelDrafter
from outrider.workers.draft_heads.trim import (
    count_tokens,
    coverage,
    token_order,
    trimmed,
    trimmed_drafter,
    trimmed_medusa,
)
from outrider.workers.weights.random_source import RandomSource
from support.parallel_oracle import EXPECTED, KINDS, folder_of
from support.tiny_heads import eagle3_drafter, mtp_drafter, parallel_drafter

TEXTS = [[5, 5, 5, 2], [2, 9, 9, 5, 7]]
TARGET = RandomSource("random:llama?num_layers=6&hidden_size=64&vocab_size=320")
KEPT = torch.tensor([0, 3, 150, 151, 319])


def test_the_commonest_tokens_come_first_and_end_of_text_before_them() -> None:
    counts = count_tokens(TEXTS, 10)
    assert counts.tolist() == [0, 0, 2, 0, 0, 4, 0, 1, 0, 2]
    order = token_order(counts, always=[8], low_ids=0)
    # Of equals the lower id; unseen tokens behind, from the lowest on.
    assert order.tokens.tolist() == [8, 5, 2, 9, 7, 0, 1, 3, 4, 6]
    assert order.first(4).tolist() == [2, 5, 8, 9]
    assert coverage(counts, order.first(4)) == 8 / 9


def test_a_vocabulary_may_be_as_large_as_a_coverage_needs() -> None:
    counts = count_tokens(TEXTS, 10)
    order = token_order(counts, always=[8], low_ids=0)
    assert [order.size_for(counts, share) for share in (4 / 9, 0.5, 8 / 9, 1.0)] == [2, 3, 4, 5]


def test_low_ids_are_kept_in_any_case() -> None:
    counts = count_tokens(TEXTS, 10)
    order = token_order(counts, always=[8], low_ids=2)
    assert order.first(4).tolist() == [0, 1, 5, 8]
    with pytest.raises(ValueError, match=r"--size must be from 3 .* to 10, got 2"):
        order.first(2)


def test_texts_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 9, got token 9"):
        count_tokens(TEXTS, 9)


@pytest.mark.parametrize("rank", [16, 3])
def test_a_trimmed_head_gives_the_same_logits_of_fewer_tokens(rank: int) -> None:
    head = make_lm_head(LmHeadShape(16, 6, rank), torch.tensor([0, 2, 3, 7, 11, 12]))
    small = trimmed(head, torch.tensor([2, 7, 12]))
    rows = torch.randn(4, 16)
    assert small.ids.tolist() == [2, 7, 12]
    torch.testing.assert_close(small(rows), head(rows)[:, [1, 3, 5]])


def test_medusa_heads_are_trimmed_alike() -> None:
    shape = MedusaShape(16, 20, 3, 1, LmHeadShape(16, 20, 16), False)
    heads = MedusaHeads(shape, torch.arange(20))
    small = trimmed_medusa(heads, torch.tensor([1, 19]))
    rows = torch.randn(4, 16)
    torch.testing.assert_close(small(rows), heads(rows)[..., [1, 19]])
    assert small.shape.lm_head == LmHeadShape(16, 2, 16)


def paired(drafter: ParallelDrafter, rows: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Logits of levels after these tokens, with the pair term."""
    return drafter.with_pair(drafter.logits(rows), drafter.pair_rows(previous, rows)).detach()


@pytest.mark.parametrize("drafter", [eagle3_drafter(TARGET, (2, 3, 4)), mtp_drafter(TARGET)])
def test_a_drafter_with_a_trimmed_head_is_otherwise_the_same(drafter: Eagle3Drafter | MtpDrafter) -> None:
    small = trimmed_drafter(drafter, KEPT)
    assert small.shape.lm_head == LmHeadShape(64, len(KEPT), 64)
    rows = torch.randn(4, 64)
    torch.testing.assert_close(small.logits(rows), drafter.logits(rows)[:, KEPT])
    taps = torch.randn(4, 64 * len(drafter.shape.taps))
    torch.testing.assert_close(small.features(taps), drafter.features(taps))
    theirs = drafter.state_dict()
    for name, weight in small.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(weight, theirs[name]), name


def test_a_head_for_multi_token_prediction_has_its_own_lm_head_once_it_is_trimmed(tmp_path: Path) -> None:
    drafter = mtp_drafter(TARGET)
    drafter.shares_lm_head = True
    small = trimmed_drafter(drafter, KEPT)
    write_mtp(tmp_path, small, HeadDescription(), "deepseek", torch.float32)
    back, _ = read_mtp(tmp_path)
    assert not back.shares_lm_head
    assert torch.equal(back.lm_head.ids, KEPT)
    assert torch.equal(back.lm_head.matrix(), drafter.lm_head.matrix()[KEPT])


@pytest.mark.parametrize(
    "pair", [NO_PAIR, PairShape("markov", 8), PairShape("gated", 8), PairShape("selector", 8, 4)]
)
def test_what_a_pair_term_has_for_each_id_goes_with_the_ids(pair: PairShape) -> None:
    drafter = parallel_drafter(TARGET, (1, 2, 5), pair=pair)
    small = trimmed_drafter(drafter, KEPT)
    rows, previous = torch.randn(40, 64), torch.arange(40) * 8  # of any token, a kept one or not
    full, own = paired(drafter, rows, previous)[:, KEPT], paired(small, rows, previous)
    # What a selector chose of all, it chooses of fewer as well.
    chosen = full.isfinite()
    assert chosen.any()
    torch.testing.assert_close(own[chosen], full[chosen])
    assert (own.isfinite().sum(1) == (4 if pair.kind == "selector" else 5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trimmed_parallel_drafter_is_written_in_the_layout_it_came_in_and_goes_on_sharing(
    tmp_path: Path, kind: str
) -> None:
    """With windows, a selector and convolutions, which our own layout does not have."""
    drafter, _ = read_parallel(folder_of(kind))
    if drafter.shares_lm_head:
        drafter.take_target(load_file(folder_of(kind) / EXPECTED)["head"])
    kept = torch.tensor([0, 5, 39]) if kind == "dspark" else torch.arange(1, 40, 4)
    small = trimmed_drafter(drafter, kept)
    description = HeadDescription("its target", 16, 32, 40)
    write_parallel_as(tmp_path, small, description, folder_of(kind), torch.float32)
    back, said = read_parallel(tmp_path)
    assert (back.shape, said) == (small.shape, description)
    assert back.shares_lm_head == drafter.shares_lm_head == (kind != "dspark")
    assert torch.equal(back.lm_head.ids, kept)
    if back.shares_lm_head:
        back.take_target(load_file(folder_of(kind) / EXPECTED)["head"][kept])
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, small.state_dict()[name]), name
