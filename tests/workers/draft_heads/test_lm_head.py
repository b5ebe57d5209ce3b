"""LM heads: the two matrices start as the best ones for the one, and rows keep their ids."""

import torch

from outrider.workers.draft_heads.lm_head import (
    DenseLmHead,
    LmHeadShape,
    LowRankLmHead,
    low_rank_start,
    make_lm_head,
    rank_of,
)


def test_a_start_that_knows_its_rows_is_nearer_to_the_law_there() -> None:
    """Rows in few directions, tokens of unequal probability: as in language models."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 16, generator=generator) + 3.0
    rows = torch.randn(500, 16, generator=generator) * torch.linspace(0.05, 1.0, 16)
    law = (rows @ weight.T).log_softmax(-1)

    def kl(down: torch.Tensor, up: torch.Tensor) -> float:
        ours = (rows @ down.T @ up.T).log_softmax(-1)
        return float((law.exp() * (law - ours)).sum(-1).mean())

    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain_svd = (s[:5, None] * v[:5], u[:, :5])
    assert kl(*low_rank_start(weight, 5, rows)) < 0.75 * kl(*plain_svd)
    # Of full rank nothing is lost but what no softmax sees.
    assert kl(*low_rank_start(weight, 16, rows)) < 1e-5


def test_a_head_of_two_matrices_gives_the_logits_of_their_product() -> None:
    ids = torch.tensor([1, 4, 9])
    head = make_lm_head(LmHeadShape(8, 3, 2), ids)
    assert isinstance(head, LowRankLmHead)
    assert head.shape == LmHeadShape(8, 3, 2)
    rows = torch.randn(2, 5, 8)
    torch.testing.assert_close(head(rows), rows @ head.matrix().T)
    assert sorted(head.state_dict()) == ["down.weight", "up.weight"]


def test_full_rank_is_one_matrix() -> None:
    head = make_lm_head(LmHeadShape(8, 3, 8), torch.tensor([0, 1, 2]))
    assert isinstance(head, DenseLmHead)
    assert list(head.state_dict()) == ["weight"]


def test_ranks_are_named_by_their_divisor() -> None:
    assert rank_of(4096, 8) == 512
    assert rank_of(576, 5) == 115
