"""Which tokens a trimmed head keeps, and that rows go with their ids."""

import pytest
import torch

from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.draft_heads.trim import (
    count_tokens,
    coverage,
    token_order,
    trimmed,
    trimmed_medusa,
)

TEXTS = [[5, 5, 5, 2], [2, 9, 9, 5, 7]]


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
