"""Losses over a vocabulary: the fast path in pieces against the one written out, gradients included."""

import pytest
import torch
from torch import Tensor

from outrider.workers.training import vocabulary_loss as fast
from outrider.workers.training.losses import LOSSES, acceptance, eager_loss, kl, tv, with_rest
from outrider.workers.training.vocabulary_loss import SoftTargets, vocabulary_loss

N, V, R, K = 37, 150, 12, 6


def case(seed: int = 0) -> tuple[Tensor, Tensor, SoftTargets, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, R, generator=generator)
    matrix = torch.randn(V, R, generator=generator)
    law = torch.log_softmax(2 * torch.randn(N, V, generator=generator), dim=-1)
    log_probs, columns = law.topk(K)
    return rows, matrix, SoftTargets(columns, log_probs), torch.rand(N, generator=generator)


def with_gradients(
    rows: Tensor, matrix: Tensor, soft: SoftTargets, weights: Tensor, loss: str
) -> list[Tensor]:
    rows, matrix = rows.clone().requires_grad_(), matrix.clone().requires_grad_()
    value, *_ = vocabulary_loss(rows, matrix, soft, weights, loss)
    return [value.detach(), *torch.autograd.grad(value, (rows, matrix))]


def written_out(rows: Tensor, matrix: Tensor, soft: SoftTargets, weights: Tensor, loss: str) -> list[Tensor]:
    rows, matrix = rows.double().requires_grad_(), matrix.double().requires_grad_()
    value = eager_loss(rows @ matrix.T, soft.columns, soft.log_probs.double(), weights.double(), LOSSES[loss])
    return [value.detach(), *torch.autograd.grad(value, (rows, matrix))]


@pytest.mark.parametrize("loss", LOSSES)
def test_pieces_give_the_loss_and_gradients_of_the_whole(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fast._PIECE_ELEMENTS, "cpu", 10 * V)
    for found, wanted in zip(with_gradients(*case(), loss), written_out(*case(), loss), strict=True):
        # float32 against float64, sums of some hundred terms of order 1. Seen: up to 5e-6.
        torch.testing.assert_close(found.double(), wanted, atol=3e-5, rtol=1e-5)


def test_columns_that_nobody_trains_get_no_gradient_and_change_no_other() -> None:
    rows, matrix, soft, weights = case()
    gradients = []
    for num_fixed in (0, 7):
        own = matrix.clone().requires_grad_()
        value, *_ = vocabulary_loss(rows, own, soft, weights, "kl_tv", num_fixed)
        gradients += torch.autograd.grad(value, own)
    assert not gradients[1][:, :7].any()
    torch.testing.assert_close(gradients[1][:, 7:], gradients[0][:, 7:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_in_bfloat16_the_gradient_points_the_same_way(loss: str) -> None:
    rows, matrix, soft, weights = case()
    narrow = [x.bfloat16() for x in (rows, matrix)]
    found = with_gradients(narrow[0], narrow[1], soft, weights, loss)
    wanted = written_out(narrow[0].float(), narrow[1].float(), soft, weights, loss)
    # A logit of order 4 is rounded by 1/128, so a probability by a percent. Seen: cosines of 0.9999.
    assert abs(found[0] / wanted[0] - 1) < 0.01
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert torch.cosine_similarity(ours.double().flatten(), theirs.flatten(), dim=0) > 0.999


def test_a_logit_far_above_the_targets_choice_does_not_overflow() -> None:
    rows, matrix, soft, weights = case()
    matrix = matrix.clone()
    other = next(column for column in range(V) if column not in soft.columns)
    matrix[other] *= 300.0
    for found, wanted in zip(
        with_gradients(rows, matrix, soft, weights, "kl"),
        written_out(rows, matrix, soft, weights, "kl"),
        strict=True,
    ):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.double(), wanted, atol=1e-2, rtol=1e-4)


def test_a_certain_target_gives_cross_entropy() -> None:
    rows, matrix, soft, _ = case()
    certain = SoftTargets(soft.columns[:, :1], torch.zeros(N, 1))
    value, *_ = vocabulary_loss(rows, matrix, certain, torch.ones(N), "kl")
    wanted = torch.nn.functional.cross_entropy(rows @ matrix.T, soft.columns[:, 0], reduction="sum")
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-4)


def test_the_same_law_is_no_loss_and_full_acceptance() -> None:
    law = with_rest(torch.tensor([[0.5, 0.2, 0.1], [0.9, 0.05, 0.05]]).log())
    torch.testing.assert_close(acceptance(law, law), torch.ones(2))
    torch.testing.assert_close(kl(law, law), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(tv(law, law), torch.zeros(2), atol=1e-6, rtol=0)


def test_parts_by_hand() -> None:
    p = with_rest(torch.tensor([[0.5, 0.3]]).log())  # and 0.2 for all others
    q = torch.tensor([[0.25, 0.25, 0.5]]).log()
    torch.testing.assert_close(acceptance(p, q), torch.tensor([0.25 + 0.25 + 0.2]))
    torch.testing.assert_close(tv(p, q), torch.tensor([0.3]))
    torch.testing.assert_close(LOSSES["lk_alpha"](p, q), -torch.tensor([0.7]).log())
    weight = torch.exp(torch.tensor(-3 * 0.7))
    torch.testing.assert_close(LOSSES["lk_lambda"](p, q), weight * kl(p, q) + (1 - weight) * tv(p, q))
