"""Of shared noise the gap counts, in units of how far target and drafter are apart: found from outcomes alone."""

import numpy as np
import pytest
import torch

from outrider.kernels.noise import gumbel
from outrider.workers.drafting.spread import Asked, Spreads, perturbed
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sequences.params import SamplingParams


@pytest.mark.parametrize("sigma", [0.4, 1.5])
def test_the_spread_of_outcomes_is_found(sigma: float) -> None:
    """Three candidates of which one always comes out: the target's score is the drafter's and noise of this scale."""
    generator, spreads = np.random.default_rng(0), Spreads(1, 2)
    for _ in range(4000):
        scores = np.sort(generator.gumbel(size=3))[::-1]
        which = int((scores + sigma * generator.gumbel(size=3)).argmax())
        spreads.learn(Asked((7,), np.arange(3), scores, -0.5, 0), which)
    assert spreads.sigma(0, 1) == pytest.approx(sigma, rel=0.3)
    assert spreads.sigma(0, 0) == 1.0  # another level
    scores = np.array([[1.0, 0.4, -0.2]])
    found = spreads.probabilities(scores, np.array([-0.5]), np.zeros(1, dtype=np.int64), 1)
    expected = np.exp(scores / sigma) / np.exp(scores / sigma).sum()
    np.testing.assert_allclose(found, expected, atol=0.12)


def test_how_often_none_comes_out_depends_on_how_sure_the_drafter_is() -> None:
    generator, spreads = np.random.default_rng(1), Spreads(1, 1)
    for _ in range(4000):
        is_sure = generator.random() < 0.5
        misses = generator.random() < (0.1 if is_sure else 0.8)
        asked = Asked((), np.arange(2), np.array([0.0, -1.0]), -0.1 if is_sure else -3.0, 0)
        spreads.learn(asked, 2 if misses else 0)
    scores, laws = np.array([[0.0, -1.0], [0.0, -1.0], [-np.inf, -np.inf]]), np.zeros(3, dtype=np.int64)
    found = spreads.probabilities(scores, np.array([-0.1, -3.0, -np.inf]), laws, 0)
    assert found[0].sum() == pytest.approx(0.9, abs=0.1)
    assert found[1].sum() == pytest.approx(0.2, abs=0.1)
    assert found[2].tolist() == [0.0, 0.0]


def test_outcomes_are_those_of_nodes_that_came_out() -> None:
    asked = Asked((4, 5), np.array([6, 7]), np.zeros(2), 0.0, 0)
    texts: tuple[list[int], ...] = ([4, 5, 7], [4, 5, 8, 6], [4, 6, 7], [4, 5], [])
    assert [asked.outcome(text) for text in texts] == [1, 2, -1, -1, -1]


def test_scores_have_the_noise_of_their_seed_position_and_token() -> None:
    noisy = SampledRows(SamplingParams(temperature=0.5, seed=3), np.array([9, 10]), PenaltyState(()))
    greedy = SampledRows(SamplingParams(temperature=0.0), np.array([4]), PenaltyState(()))
    tokens, log_probs = np.array([[5, 6], [6, 7], [8, 9]]), np.full((3, 2), -1.0)
    found = perturbed(log_probs, tokens, [noisy, greedy])
    for row, position in enumerate((9, 10)):
        expected = -1.0 + gumbel(3, position, torch.from_numpy(tokens[row])).numpy()
        np.testing.assert_allclose(found[row], expected, rtol=1e-6)
    assert found[2].tolist() == [-1.0, -1.0]
