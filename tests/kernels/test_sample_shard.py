"""The pruned reductions against the plain ones over the whole row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.kernels.noise import gumbel_from_hash, hash_ids, noise_key
from outrider.kernels.sample_shard import AskedRows, sample_shard
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.shard_logits import ShardLogits
from outrider.kernels.token_rows import UInt64Array, pack_tokens, unpack_tokens

FIRST = np.array([0])  # rows


def plain_scores(row: np.ndarray, temperature: float, seed: int, position: int, offset: int) -> np.ndarray:
    if temperature == 0.0:
        return row
    ids = np.arange(len(row)) + offset
    return row / np.float32(temperature) + gumbel_from_hash(hash_ids(noise_key(seed, position), ids))


def best_of_row(shard: ShardLogits, temperature: float, seed: int, position: int, count: int) -> UInt64Array:
    keys = np.array([noise_key(seed, position)], dtype=np.uint32)
    return shard.best(FIRST, np.array([temperature], dtype=np.float32), keys, count)[0]


def ranked(values: np.ndarray, offset: int) -> list[int]:
    """Ids by falling value, then by rising id."""
    return (np.lexsort((np.arange(len(values)), -values)) + offset).tolist()


shapes = st.sampled_from(["peaked", "text", "flat", "constant", "integers", "mostly removed"])


def random_row(shape: str, size: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    row = generator.standard_normal(size)
    if shape == "peaked":
        row[generator.integers(size)] += 20
    elif shape == "text":
        row = 2.5 * row + 12 * (generator.random(size) < 0.001)
    elif shape == "constant":
        row[:] = 1.5
    elif shape == "integers":
        row = np.round(row)
    elif shape == "mostly removed":
        row[generator.random(size) < 0.99] = -np.inf
        row[generator.integers(size)] = 0.0
    return row.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    size=st.sampled_from([1, 5, 127, 128, 129, 1000, 4096, 20_000]),
    temperature=st.sampled_from([0.0, 0.01, 0.3, 0.8, 1.0, 2.0, 100.0]),
    count=st.integers(1, 6),
    offset=st.sampled_from([0, 3, 100_000]),
    seed=st.integers(0, 2**64 - 1),
)
def test_best_equals_the_full_search(
    shape: str, size: int, temperature: float, count: int, offset: int, seed: int
) -> None:
    row, count = random_row(shape, size, seed % 2**32), min(count, size)
    shard = ShardLogits(torch.from_numpy(row)[None], ShardIds.from_first(offset, size))
    values, ids = unpack_tokens(best_of_row(shard, temperature, seed, 3, count))
    scores = plain_scores(row, temperature, seed, 3, offset)
    assert ids.tolist() == ranked(scores, offset)[:count]
    assert values.tolist() == scores[ids - offset].tolist()


def test_ids_with_very_large_noise_win_from_far_below() -> None:
    # Every row has one token far ahead; the best of the others is often one that only its noise lifts.
    row = np.zeros(150_000, dtype=np.float32)
    row[0] = 14.0
    won = 0
    for position in range(60):
        shard = ShardLogits(torch.from_numpy(row)[None], ShardIds.from_first(0, 150_000))
        ids = unpack_tokens(best_of_row(shard, 1.0, 8, position, 3))[1]
        assert ids.tolist() == ranked(plain_scores(row, 1.0, 8, position, 0), 0)[:3]
        won += int(ids[0] != 0)
    assert 0 < won < 60


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    size=st.sampled_from([1, 130, 1000, 20_000]),
    count=st.sampled_from([1, 2, 64, 500, 30_000]),
    seed=st.integers(0, 1000),
)
def test_top_equals_a_full_sort(shape: str, size: int, count: int, seed: int) -> None:
    row = random_row(shape, size, seed)
    values, ids = unpack_tokens(
        ShardLogits(torch.from_numpy(row)[None], ShardIds.from_first(7, size)).top(FIRST, count)[0]
    )
    assert ids.tolist() == ranked(row, 7)[:count]
    largest = ShardLogits(torch.from_numpy(row)[None], ShardIds.from_first(7, size)).largest(FIRST, count)[0]
    assert largest.tolist() == values.tolist()
    assert values.tolist() == row[ids - 7].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_maximum_and_sum_give_the_normaliser(temperature: float) -> None:
    logits = torch.randn(3, 1003, generator=torch.Generator().manual_seed(0)) * 4
    shard = ShardLogits(logits, ShardIds.from_first(0, 1003))
    rows, maxima = np.arange(3), shard.maxima(np.arange(3))
    sums = shard.exp_sums(rows, maxima, np.full(3, temperature, dtype=np.float32))
    for row in range(3):
        log_total = maxima[row] / temperature + np.log(sums[row])
        expected = torch.logsumexp(logits[row].double() / temperature, 0).item()
        assert log_total == pytest.approx(expected, abs=1e-5)


def test_a_shard_of_removed_tokens_has_no_mass() -> None:
    shard = ShardLogits(torch.full((1, 300), -torch.inf), ShardIds.from_first(0, 300))
    assert shard.exp_sums(FIRST, np.array([3.0], np.float32), np.array([1.0], np.float32)).tolist() == [0.0]
    assert shard.maxima(FIRST).tolist() == [-np.inf]


def test_the_reference_samples_rows_one_by_one() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    temperatures = np.array([0.0, 1.0, 0.7], dtype=np.float32)
    keys = np.array([noise_key(5, position) for position in (1, 2, 3)], dtype=np.uint32)
    result = sample_shard(logits, AskedRows.best(temperatures, keys, 2), ShardIds.from_first(1000, 500))
    for i, (temperature, position) in enumerate(zip(temperatures.tolist(), (1, 2, 3), strict=True)):
        scores = plain_scores(logits[i].numpy(), temperature, 5, position, 1000)
        winners = result.winners[i]
        assert winners["column"].tolist() == np.argsort(-scores)[:2].tolist()
        assert winners["score"].tolist() == scores[winners["column"]].tolist()
        divisor = temperature or 1.0
        log_total = result.sums["maximum"][i] / divisor + np.log(result.sums["sum"][i])
        assert log_total == pytest.approx(torch.logsumexp(logits[i].double() / divisor, 0).item(), abs=1e-5)


def test_what_is_asked_must_fit_the_shard() -> None:
    asked = AskedRows.nothing(2)
    with pytest.raises(ValueError, match="shard_ids has 5 entries, logits has 7 columns"):
        sample_shard(torch.zeros(2, 7), asked, ShardIds.from_first(0, 5))
    with pytest.raises(ValueError, match="lists must have at most 7 tokens, got 8 and 0"):
        sample_shard(torch.zeros(2, 7), replace(asked, list_size=8), ShardIds.from_first(0, 7))


def test_packed_tokens_sort_by_falling_value_then_rising_id() -> None:
    values = np.array([1.0, -2.5, 0.0, -0.0, np.inf, -np.inf, 1e-30, -1e-30, 1.0], dtype=np.float32)
    ids = np.array([5, 6, 8, 7, 9, 10, 11, 12, 2])
    ordered_values, ordered_ids = unpack_tokens(np.sort(pack_tokens(values, ids)))
    assert ordered_ids.tolist() == [9, 2, 5, 11, 7, 8, 12, 6, 10]
    assert ordered_values.tolist() == [
        np.inf, 1.0, 1.0, np.float32(1e-30), 0.0, 0.0, np.float32(-1e-30), -2.5, -np.inf,
    ]  # fmt: skip
