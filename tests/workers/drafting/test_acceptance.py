import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.kernels.proposals import NUM_SAMPLED_KINDS, priors_and_kinds
from outrider.workers.drafting.acceptance import AcceptanceEstimator

A, B = 3, 7


def observe(estimator: AcceptanceEstimator, source: int, *outcomes: bool) -> None:
    estimator.observe(np.full(len(outcomes), source), np.array(outcomes, dtype=np.bool_))


def estimate(estimator: AcceptanceEstimator, source: int, prior: float) -> float:
    return float(estimator.estimate(np.array([source]), np.array([prior]))[0])


@pytest.fixture
def estimator() -> AcceptanceEstimator:
    """With room for two methods: keys 1 to 5, and 6 to 8."""
    made = AcceptanceEstimator(3)
    assert (made.reserve(5), made.reserve(3)) == (1, 6)
    return made


def test_the_prior_holds_until_something_was_seen(estimator: AcceptanceEstimator) -> None:
    priors = np.array([[0.3, 0.0], [0.6, 1.0]])
    estimates = estimator.estimate(np.array([[A, A], [B, 8]]), priors)
    assert estimates == pytest.approx(np.array([[0.3, 0.001], [0.6, 0.995]]))


def test_the_prior_is_worth_six_observations(estimator: AcceptanceEstimator) -> None:
    estimator.observe(np.array([A, B, A, A, A, A, A]), np.array([True, False, *[True] * 5]))
    assert estimate(estimator, A, 0.3) == pytest.approx((6 + 6 * 0.3) / 12)
    assert estimate(estimator, B, 0.3) == pytest.approx(6 * 0.3 / 7)
    assert estimate(estimator, A + 1, 0.3) == pytest.approx(0.3)  # another source learns nothing from it


def test_what_one_rule_refuses_teaches_no_other(estimator: AcceptanceEstimator) -> None:
    sources, lossy = np.full(20, A), np.array([0, 2] * 10)
    estimator.observe(sources, lossy == 2, lossy)
    exact, kept = estimator.estimate(np.array([A, A]), np.array([0.5, 0.5]), np.array([0, 2]))
    assert (exact, kept) == pytest.approx((3 / 16, 13 / 16))
    assert estimator.estimate(np.array([A]), np.array([0.5]), np.array([1])) == 0.5


def test_room_for_more_forgets_nothing(estimator: AcceptanceEstimator) -> None:
    observe(estimator, A, *[True] * 6)
    assert estimator.reserve(4) == 9
    assert estimate(estimator, A, 0.3) == pytest.approx(0.65)
    assert estimate(estimator, 12, 0.3) == pytest.approx(0.3)


def test_many_observations_outweigh_the_prior(estimator: AcceptanceEstimator) -> None:
    for _ in range(250):
        observe(estimator, A, False, True, True, True)
    assert estimate(estimator, A, 0.0) == pytest.approx(0.75, abs=0.03)


def test_old_observations_fade_when_the_text_changes(estimator: AcceptanceEstimator) -> None:
    observe(estimator, A, *[True] * 10_000)
    for _ in range(200):
        observe(estimator, A, False)
    assert 0.3 < estimate(estimator, A, 0.5) < 0.45  # e**-1: two hundred observations are the memory
    for _ in range(1000):
        observe(estimator, A, False)
    assert estimate(estimator, A, 0.5) < 0.05


@given(st.lists(st.lists(st.booleans(), max_size=300), max_size=4), st.floats(0.0, 1.0))
def test_an_estimate_is_never_certain(rounds: list[list[bool]], prior: float) -> None:
    estimator = AcceptanceEstimator()
    estimator.reserve(A)
    for outcomes in rounds:
        observe(estimator, A, *outcomes)
    assert 0.001 <= estimate(estimator, A, prior) <= 0.995


@pytest.mark.parametrize(
    ("log_prob", "bucket"),
    [(0.0, 0), (-0.02, 0), (-0.05, 1), (-0.2, 2), (-1.0, 4), (-4.0, 7), (-9.0, 8), (float("-inf"), 8)],
)
def test_buckets_of_confidence(log_prob: float, bucket: int) -> None:
    _, kinds = priors_and_kinds(np.full((1, 3), log_prob), np.array([False]))
    assert kinds.tolist() == [[bucket, 9 + bucket, 18 + bucket]]


@pytest.mark.parametrize("is_greedy", [True, False])
def test_a_confident_first_proposal_has_a_high_prior_and_leaves_little_to_the_others(is_greedy: bool) -> None:
    log_probs = np.array([[-0.01, -5.0, -6.0], [-1.2, -1.4, -1.5]])
    priors, kinds = priors_and_kinds(log_probs, np.array([is_greedy] * 2))
    first = 45 * is_greedy
    assert (kinds - first).tolist() == [[0, 16, 26], [4, 14, 23]]
    assert priors[0, 0] > 0.9
    assert priors[0, 1] < 0.06
    assert priors[1, 1] > 0.1


def test_ranks_beyond_the_fourth_are_one_kind_and_all_kinds_have_a_key() -> None:
    _, kinds = priors_and_kinds(np.full((2, 10), -9.0), np.array([True, False]))
    assert kinds[1].tolist() == [8, 17, 26, 35, 44, 44, 44, 44, 44, 44]
    assert kinds.max() == NUM_SAMPLED_KINDS - 1


def test_greedy_and_sampled_requests_do_not_teach_each_other() -> None:
    estimator = AcceptanceEstimator()
    first = estimator.reserve(NUM_SAMPLED_KINDS)
    priors, kinds = priors_and_kinds(np.array([[-1.0], [-1.0]]), np.array([True, False]))
    observe(estimator, first + int(kinds[0, 0]), *[False] * 100)
    greedy, sampled = estimator.estimate(first + kinds, priors)[:, 0]
    assert greedy < 0.1
    assert sampled == pytest.approx(priors[1, 0])


@pytest.mark.parametrize("is_greedy", [True, False])
def test_priors_of_siblings_leave_room_for_a_miss(is_greedy: bool) -> None:
    q = np.array([0.05, 0.2, 0.5, 0.9])[:, None]
    log_probs = np.log(np.concatenate([q, *[(1 - q) / 4] * 4], axis=1))
    priors, _ = priors_and_kinds(log_probs, np.full(4, is_greedy))
    assert (priors.sum(axis=1) < 1.0).all()
    assert (priors > 0.0).all()
