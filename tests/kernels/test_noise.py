"""Noise is a pure function of (seed, position, id), uniform, and the same to the bit for ever."""

import numpy as np
import pytest
import torch
from scipy import stats

from outrider.kernels.noise import (
    gumbel,
    gumbel_from_hash,
    hash_ids,
    ids_with_hash_below,
    noise_key,
    uniform_from_hash,
)


def uniform(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(uniform_from_hash(hash_ids(noise_key(seed, position), ids.numpy())))


def test_keys_are_the_published_splitmix64() -> None:
    # First output of splitmix64 seeded with 0, as in the reference implementation.
    low, high = noise_key(seed=0, position=0)
    assert (high << 32) | low == 0xE220A8397B1DCDAF
    assert noise_key(seed=1234567890123456789, position=77) == (0x676D90DF, 0x0285A4C7)


def test_pinned_values() -> None:
    # Any other implementation, on any device, has to give these bits.
    key = noise_key(seed=42, position=7)
    assert key == (0x9E9E2FA4, 0xCCF635EE)
    h = hash_ids(key, np.array([0, 1, 2, 49151, 151935]))
    assert h.tolist() == [0x427C83D4, 0x99FEC0D4, 0xA2E28EF1, 0x42C557F6, 0xA40654A1]
    expected_uniform = [
        0.25971245765686035,
        0.6015434861183167,
        0.6362695097923279,
        0.26082372665405273,
        0.6407216191291809,
    ]
    assert uniform_from_hash(h).tolist() == expected_uniform
    expected_gumbel = [
        1.2015869617462158,
        0.08321106433868408,
        -0.011278257705271244,
        1.196603775024414,
        -0.023382248356938362,
    ]
    assert gumbel_from_hash(h).tolist() == pytest.approx(expected_gumbel, rel=1e-6)


def test_ends_of_the_range() -> None:
    h = np.array([0, 1, 2**32 - 1], dtype=np.uint32)
    assert uniform_from_hash(h).tolist() == [2.0**-33, 3 * 2.0**-33, 1 - 2.0**-24]
    noise = gumbel_from_hash(h)
    assert np.isfinite(noise).all()
    assert noise[0] == pytest.approx(33 * np.log(2), rel=1e-6)
    assert noise[2] == pytest.approx(-np.log(24 * np.log(2)), rel=1e-6)


def test_noise_does_not_rise_with_the_hash() -> None:
    h = np.concatenate([np.arange(2**16), np.linspace(0, 2**32 - 1, 2**16)]).astype(np.uint32)
    assert (np.diff(gumbel_from_hash(np.sort(h))) <= 0).all()


def test_value_of_an_id_does_not_depend_on_what_it_is_computed_with() -> None:
    ids = torch.arange(1000)
    together = gumbel(3, 5, ids)
    assert torch.equal(gumbel(3, 5, ids[[7]]), together[[7]])
    assert torch.equal(gumbel(3, 5, ids.flip(0)).flip(0), together)
    assert torch.equal(gumbel(3, 5, ids.view(10, 100)).view(-1), together)
    assert torch.equal(torch.cat([gumbel(3, 5, ids[:333]), gumbel(3, 5, ids[333:])]), together)


def test_seed_and_position_both_matter() -> None:
    ids = torch.arange(1000)
    draws = [uniform(seed, position, ids) for seed in (0, 1, 2**63) for position in (0, 1, 100_000)]
    correlations = np.corrcoef(torch.stack(draws).numpy()) - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.12  # 1 / sqrt(1000) is 0.03


def test_different_ids_have_different_hashes() -> None:
    assert len(np.unique(hash_ids(noise_key(1, 1), np.arange(200_000)))) == 200_000


@pytest.mark.parametrize("seed", [0, 1, 987654321])
def test_uniform_over_ids(seed: int) -> None:
    assert stats.kstest(uniform(seed, 12, torch.arange(50_000)).numpy(), "uniform").pvalue > 1e-3


def test_uniform_over_positions_and_over_seeds() -> None:
    token = torch.tensor([17])
    over_positions = [uniform(5, position, token).item() for position in range(20_000)]
    over_seeds = [uniform(seed, 5, token).item() for seed in range(20_000)]
    for values in (over_positions, over_seeds):
        assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_gumbel_distribution() -> None:
    assert stats.kstest(gumbel(9, 9, torch.arange(50_000)).numpy(), "gumbel_r").pvalue > 1e-3


def test_neighbouring_ids_are_independent() -> None:
    values = uniform(4, 4, torch.arange(100_001)).numpy()
    cells = np.histogram2d(values[:-1], values[1:], bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-3


@pytest.mark.parametrize(("first", "end"), [(0, 152_000), (50_000, 50_001), (75_000, 152_000)])
def test_listing_ids_by_inverting_the_hash(first: int, end: int) -> None:
    bound = 2**16
    for position in range(20):
        key = noise_key(11, position)
        ids = np.arange(first, end)
        expected = ids[hash_ids(key, ids) < bound]
        rows, found = ids_with_hash_below(np.array([(0, 0), key], dtype=np.uint32), bound, first, end)
        assert sorted(found[rows == 1]) == expected.tolist()
