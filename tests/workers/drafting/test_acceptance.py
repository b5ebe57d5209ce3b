import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.workers.drafting.acceptance import AcceptanceEstimator, log_prob_bucket, model_source

A, B = (1, 0, 0), (1, 0, 1)


def test_the_prior_holds_until_something_was_seen() -> None:
    assert AcceptanceEstimator().estimate(A, 0.3) == pytest.approx(0.3)


def test_the_prior_is_worth_six_observations() -> None:
    estimator = AcceptanceEstimator()
    for _ in range(6):
        estimator.observe(A, True)
    assert estimator.estimate(A, 0.3) == pytest.approx((6 + 6 * 0.3) / 12)
    assert estimator.estimate(B, 0.3) == pytest.approx(0.3)  # another source learns nothing from it


def test_many_observations_outweigh_the_prior() -> None:
    estimator = AcceptanceEstimator()
    for i in range(1000):
        estimator.observe(A, i % 4 > 0)
    assert estimator.estimate(A, 0.0) == pytest.approx(0.75, abs=0.03)


def test_old_observations_fade_when_the_text_changes() -> None:
    estimator = AcceptanceEstimator()
    for _ in range(10_000):
        estimator.observe(A, True)
    for _ in range(200):
        estimator.observe(A, False)
    assert 0.3 < estimator.estimate(A, 0.5) < 0.45  # e**-1: two hundred observations are the memory
    for _ in range(1000):
        estimator.observe(A, False)
    assert estimator.estimate(A, 0.5) < 0.05


@given(st.lists(st.booleans(), max_size=300), st.floats(0.0, 1.0))
def test_an_estimate_is_never_certain(outcomes: list[bool], prior: float) -> None:
    estimator = AcceptanceEstimator()
    for outcome in outcomes:
        estimator.observe(A, outcome)
    assert 0.001 <= estimator.estimate(A, prior) <= 0.995


@pytest.mark.parametrize(
    ("log_prob", "bucket"),
    [(0.0, 0), (-0.02, 0), (-0.05, 1), (-0.2, 2), (-1.0, 4), (-4.0, 7), (-9.0, 8), (float("-inf"), 8)],
)
def test_buckets_of_confidence(log_prob: float, bucket: int) -> None:
    assert log_prob_bucket(log_prob) == bucket


@pytest.mark.parametrize("is_greedy", [True, False])
def test_a_confident_first_proposal_has_a_high_prior_and_leaves_little_to_the_others(is_greedy: bool) -> None:
    confident, unsure = [-0.01, -5.0, -6.0], [-1.2, -1.4, -1.5]
    sources, priors = zip(*(model_source(1, rank, confident, is_greedy) for rank in range(3)), strict=True)
    assert sources == ((1, is_greedy, 0, 0), (1, is_greedy, 1, 7), (1, is_greedy, 2, 8))
    assert priors[0] > 0.9
    assert priors[1] < 0.06
    assert model_source(1, 1, unsure, is_greedy)[1] > 0.1
    assert model_source(1, 9, [-3.0] * 10, is_greedy)[0] == (
        1,
        is_greedy,
        4,
        6,
    )  # beyond the fourth rank: one


def test_greedy_and_sampled_requests_do_not_teach_each_other() -> None:
    estimator = AcceptanceEstimator()
    source, prior = model_source(1, 0, [-1.0], is_greedy=True)
    for _ in range(100):
        estimator.observe(source, False)
    assert estimator.estimate(source, prior) < 0.1
    source, prior = model_source(1, 0, [-1.0], is_greedy=False)
    assert estimator.estimate(source, prior) == pytest.approx(prior)


@pytest.mark.parametrize("is_greedy", [True, False])
def test_priors_of_siblings_leave_room_for_a_miss(is_greedy: bool) -> None:
    for q in (0.05, 0.2, 0.5, 0.9):
        log_probs = [math.log(q)] + [math.log((1 - q) / 4)] * 4
        assert sum(model_source(1, rank, log_probs, is_greedy)[1] for rank in range(5)) < 1.0
