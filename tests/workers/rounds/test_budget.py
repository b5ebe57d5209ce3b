"""Tokens per second on literal numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.workers.rounds.budget import CostModel, PassProfile

# A pass reads the weights (40 ms) and takes 1 ms more per row up to 8 rows, then 5 ms per row.
PROFILE = PassProfile((1, 8, 16), (0.041, 0.048, 0.088))


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [(1, 0.041), (3, 0.043), (8, 0.048), (12, 0.068), (16, 0.088), (20, 0.108), (0, 0.041)],
)
def test_times_between_the_measured_counts_are_interpolated(rows: int, seconds: float) -> None:
    assert PROFILE.at(rows) == pytest.approx(seconds)


def test_a_profile_of_one_count_is_flat() -> None:
    assert PassProfile((1,), (0.05,)).at(100) == 0.05


def test_a_pass_that_computes_multiples_of_rows_costs_what_it_computes() -> None:
    """The matrices of a target on a CPU with AVX2 alone."""
    stepped = PassProfile((1, 4, 16), (0.040, 0.040, 0.064), row_step=4)
    assert [stepped.at(rows) for rows in (1, 4, 5, 8, 9, 17)] == pytest.approx(
        [0.040, 0.040, 0.048, 0.048, 0.056, 0.072]
    )
    assert stepped.of_range(3, 15).tolist() == pytest.approx([stepped.at(rows) for rows in range(3, 18)])
    assert stepped.shares(5) == stepped.shares(8) != stepped.shares(9)
    # Three nodes fill the first pass; a fourth pays with those that come for nothing beside it, and not alone.
    values = np.array([0.6, 0.4, 0.3, 0.09, 0.08, 0.07, 0.06])
    cost = CostModel(stepped)
    assert cost.best_num_nodes(values[:4], 1, 1, 0.0) == 3
    assert cost.best_num_nodes(np.append(values[:3], [0.2, 0.18, 0.15, 0.14]), 1, 1, 0.0) == 7
    for _ in range(50):  # what is learned keeps the step
        cost.observe_target(5, 0.060)
    assert cost.target_s(8) == pytest.approx(0.060, rel=0.01)


def test_a_noisy_profile_never_says_that_more_rows_are_cheaper() -> None:
    cost = CostModel(PassProfile((1, 2, 4, 8), (0.050, 0.045, 0.060, 0.055)))
    assert cost.target.seconds == (0.050, 0.050, 0.060, 0.060)


@given(
    st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6),
    st.lists(st.integers(1, 300), min_size=2, max_size=20),
)
def test_a_pass_over_more_rows_never_costs_less(seconds: list[float], rows: list[int]) -> None:
    counts = tuple(2**i for i in range(len(seconds)))
    cost = CostModel(PassProfile(counts, tuple(seconds)))
    times = [cost.target_s(count) for count in sorted(rows)]
    assert all(b >= a - 1e-12 for a, b in pairwise(times))


def test_served_rounds_correct_the_profile() -> None:
    cost = CostModel(PassProfile((1,), (0.050,)))
    for _ in range(100):
        cost.observe_target(1, 0.060)
    assert cost.target_s(1) == pytest.approx(0.060, rel=1e-3)


def test_many_rounds_change_the_shape_of_the_profile() -> None:
    cost = CostModel(PROFILE)
    for _ in range(500):  # eight sequences and their trees, where the profile had one chain
        cost.observe_target(8, 0.080)
        cost.observe_target(12, 0.130)
    assert cost.target_s(8) == pytest.approx(0.080, rel=0.05)
    assert cost.target_s(12) == pytest.approx(0.130, rel=0.05)


def test_a_profile_that_was_too_slow_keeps_its_shape() -> None:
    cost = CostModel(PassProfile((1, 64), (10.0, 10.5)))
    for _ in range(200):
        cost.observe_target(1, 0.01)
    assert cost.target_s(1) == pytest.approx(0.01, rel=1e-2)
    assert 0.01 <= cost.target_s(64) < 0.0125


def test_rounds_beyond_the_profile_scale_all_of_it() -> None:
    cost = CostModel(PROFILE)
    before = [cost.target_s(rows) for rows in (1, 8, 16)]
    for _ in range(200):
        cost.observe_target(100, 2.0 * PROFILE.at(100))
    assert [cost.target_s(rows) for rows in (1, 8, 16)] == pytest.approx([2 * s for s in before], rel=1e-2)


@given(st.integers(0, 40))
def test_shares_interpolate(rows: int) -> None:
    shares = PROFILE.shares(rows)
    if rows > 16:
        assert not any(shares)
    else:
        assert sum(shares) == pytest.approx(1.0)
        seconds = sum(share * s for share, s in zip(shares, PROFILE.seconds, strict=True))
        assert seconds == pytest.approx(PROFILE.at(rows))


def test_a_stalled_round_hardly_counts() -> None:
    cost = CostModel(PassProfile((1,), (0.050,)))
    cost.observe_target(1, 50.0)
    assert cost.target_s(1) == pytest.approx(0.055)  # as if it had taken 0.1 s, weighted by a tenth


def test_the_first_drafter_step_counts_whole_and_later_ones_a_tenth() -> None:
    cost = CostModel(PROFILE)
    assert cost.step_s("model", 1) == 0.0
    cost.observe_step("model", 1, 0.010)
    assert cost.step_s("model", 1) == pytest.approx(0.010)
    cost.observe_step("model", 1, 0.020)
    assert cost.step_s("model", 1) == pytest.approx(0.011)
    cost.doubt_steps("model")
    assert cost.step_s("model", 1) == pytest.approx(0.011 * 0.995)


def test_a_drafter_that_has_to_catch_up_takes_longer() -> None:
    cost = CostModel(PROFILE, {"model": PassProfile((1, 32), (0.010, 0.041))})
    assert cost.step_s("model", 2) == pytest.approx(0.011)
    assert cost.step_s("model", 80) == pytest.approx(0.089)


def test_reading_costs_what_reading_was_seen_to_cost() -> None:
    cost = CostModel(PROFILE, {"model": PassProfile((1, 32), (0.010, 0.041))})
    assert cost.read_s("model", 80) == pytest.approx(0.089)
    cost.observe_reading("model", 100, 0.02)
    assert cost.read_s("model", 80) == pytest.approx(0.016)


def test_a_stalled_drafter_step_hardly_counts() -> None:
    """A process that was stopped for minutes goes on drafting when it goes on."""
    cost = CostModel(PROFILE)
    for seconds in (0.010, 160.0):
        cost.observe_step("model", 1, seconds)
        cost.observe_draft_round(seconds)
    assert cost.step_s("model", 1) == pytest.approx(0.011)
    assert cost.draft_round_s == pytest.approx(0.011)


def test_nodes_are_verified_while_they_pay() -> None:
    # Row for row: 1/41 per ms, (1 + 0.8)/42, (1 + 0.8 + 0.5)/43, ... A node must be worth 2.5 % of a token per
    # token that the round gives anyway, as it adds 1 ms to some 43.
    cost = CostModel(PROFILE)
    assert cost.best_num_nodes(np.array([0.8, 0.5, 0.2, 0.06, 0.05]), 1, 1, 0.0) == 4
    # 2.56/45 = 0.0569 per ms; a fifth node of 0.05 gives 2.61/46 = 0.0567: less.
    assert cost.best_num_nodes(np.array([0.8, 0.5, 0.2, 0.06]), 1, 1, 0.0) == 4


def test_the_budget_jumps_over_a_node_that_does_not_pay_alone() -> None:
    # Not concave: the profile's second half is the cheap one (a kernel that pads to 4 rows).
    cost = CostModel(PassProfile((1, 2, 4), (0.010, 0.020, 0.020)))
    assert cost.best_num_nodes(np.array([0.7]), 1, 1, 0.0) == 0
    assert cost.best_num_nodes(np.array([0.7, 0.7, 0.7]), 1, 1, 0.0) == 3


def test_only_the_root_is_verified_where_speculation_loses() -> None:
    # Each row costs as much as the first one (no memory-bound regime), and drafts are right every other time.
    cost = CostModel(PassProfile((1, 2), (0.010, 0.020)))
    assert cost.best_num_nodes(np.array([0.5, 0.25, 0.12]), 1, 1, 0.0) == 0
    assert cost.best_num_nodes(np.array([]), 1, 1, 0.0) == 0


def test_time_already_spent_on_drafting_makes_a_larger_tree_pay() -> None:
    cost = CostModel(PROFILE)
    values = [0.9, 0.8, 0.1, 0.03, 0.03]
    assert cost.best_num_nodes(np.array(values), 1, 1, 0.0) == 3
    assert cost.best_num_nodes(np.array(values), 1, 1, 0.050) == 5


def test_more_sequences_share_the_weights_but_fill_the_rows() -> None:
    # Eight sequences in one round: the next rows cost 5 ms each against 8 tokens in 48 ms.
    cost = CostModel(PROFILE)
    assert cost.best_num_nodes(np.array([0.9, 0.8, 0.5]), 8, 8, 0.0) == 1
    assert cost.best_num_nodes(np.array([0.9, 0.8, 0.5]), 1, 1, 0.0) == 3


def test_another_drafter_step_pays_when_it_brings_more_than_the_same_time_does_now() -> None:
    # Now: 1 token in 50 ms. A step of 10 ms costs what 0.2 tokens take.
    cost = CostModel(PassProfile((1, 2), (0.050, 0.050)))
    assert cost.saved_by_step(np.array([]), 1, 1, 0.0, step_gains=np.array([0.21]), step_s=0.010) > 0
    assert cost.saved_by_step(np.array([]), 1, 1, 0.0, step_gains=np.array([0.19]), step_s=0.010) <= 0
    # With 0.8 + 0.6 drafted in 20 ms the rate is 2.4 in 70 ms: 10 ms are worth 0.34.
    assert (
        cost.saved_by_step(np.array([0.8, 0.6]), 1, 1, 0.020, step_gains=np.array([0.33]), step_s=0.010) <= 0
    )
    assert (
        cost.saved_by_step(np.array([0.8, 0.6]), 1, 1, 0.020, step_gains=np.array([0.35]), step_s=0.010) > 0
    )


def test_a_step_for_many_sequences_has_to_pay_for_all_their_rows() -> None:
    # 8 sequences in 100 ms; each further row takes 10 ms, which is worth 0.8 tokens, and the step 5 ms, worth 0.4.
    cost = CostModel(PassProfile((8, 16), (0.100, 0.180)))
    assert cost.saved_by_step(np.array([]), 8, 8, 0.0, step_gains=np.array([0.6] * 8), step_s=0.005) <= 0
    # Two nodes that promise more than their rows cost bring 0.3 each: more than the step. The others stay out.
    assert (
        cost.saved_by_step(np.array([]), 8, 8, 0.0, step_gains=np.array([1.1, 1.1, 0.6, 0.6]), step_s=0.005)
        > 0
    )


def test_a_step_that_costs_nothing_still_has_to_pay_for_its_row() -> None:
    # Drafted while the target works: the step is free, a row more in the pass is not.
    cost = CostModel(PassProfile((1, 2), (0.050, 0.055)))
    assert cost.saved_by_step(np.array([]), 1, 1, 0.0, step_gains=np.array([0.11]), step_s=0.0) > 0
    assert cost.saved_by_step(np.array([]), 1, 1, 0.0, step_gains=np.array([0.09]), step_s=0.0) <= 0


def test_in_a_round_that_reads_a_prompt_time_is_worth_what_decoding_makes_of_it() -> None:
    # 300 rows of a prompt and one sequence that decodes: 1 token in 1.5 s, but 1 in 41 ms as soon as it is read.
    cost = CostModel(PROFILE)
    assert cost.target_s(300) > 1.4
    assert cost.saved_by_step(np.array([]), 300, 1, 0.0, step_gains=np.array([0.9]), step_s=0.035) <= 0
    assert cost.saved_by_step(np.array([]), 300, 1, 0.0, step_gains=np.array([0.9]), step_s=0.030) > 0
    assert (
        cost.best_num_nodes(np.array([0.13, 0.11]), 300, 1, 0.0) == 1
    )  # a row costs 5 ms, which is 0.12 tokens


def test_one_lane_when_half_the_rows_cost_nearly_the_same() -> None:
    # 8 rows 48 ms, 4 rows 44 ms. Drafting takes 10 ms: one lane 10 + 48 ms, two lanes 2 * 44 ms.
    cost = CostModel(PROFILE)
    cost.observe_draft_round(0.010)
    assert cost.one_lane_is_faster(8)


def test_one_lane_when_a_drafter_busy_with_two_is_the_bottleneck() -> None:
    # Drafting takes 60 ms, also for half the sequences: one lane 60 + 48 ms, two lanes 2 * 60 ms.
    cost = CostModel(PROFILE)
    cost.observe_draft_round(0.060)
    assert cost.one_lane_is_faster(8)


def test_two_lanes_when_the_time_of_a_pass_is_in_its_rows() -> None:
    # 16 rows 160 ms, 8 rows 80 ms. Drafting takes 60 ms: one lane 60 + 160 ms, two lanes 2 * 80 ms.
    cost = CostModel(PassProfile((1, 16), (0.010, 0.160)))
    cost.observe_draft_round(0.060)
    assert not cost.one_lane_is_faster(16)
