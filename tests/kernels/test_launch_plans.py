"""The plans, which need no GPU: tiles, splits, shared memory, units of copying."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.kernels.attention_cases import AttentionCase
from outrider.kernels.attention_work import KEYS_PER_TILE, attention_shape, shape_of_tiles
from outrider.kernels.gather_rows import plan_gather_rows
from outrider.kernels.int4_cases import INT4_CASES, LARGE_INT4_CASES, prepare_int4_matmul
from outrider.kernels.kernel_cases import case_shape, prepare_attention
from outrider.kernels.kv_commit import plan_kv_commit
from outrider.kernels.launch_plans import COMMIT_SHARED_BYTES, MAX_COMMIT_ROWS
from outrider.kernels.narrow_cases import LARGE_NARROW_CASES, NARROW_CASES, prepare_narrow_matmul
from outrider.kernels.narrow_matmul import MAX_SPLITS, column_splits
from outrider.kernels.narrow_matmul import SHARED_BYTES as EVERYWHERE
from outrider.kernels.tree_attention import HEAD_DIMS, shared_bytes
from support.cuda_on_cpu.kernels import source_kernels
from support.kernel_table import SHARED_BYTES

H100_SMS = 132


@pytest.mark.parametrize(
    ("nodes", "heads_per_kv", "tile_rows"),
    [(1, 8, 16), (2, 8, 16), (3, 8, 64), (9, 8, 64), (256, 8, 64), (257, 8, 128), (5, 3, 16)],
)
def test_tiles_follow_the_rows(nodes, heads_per_kv, tile_rows):
    assert attention_shape(nodes, 8192, 1, nodes, heads_per_kv, 1, H100_SMS).tile_rows == tile_rows


def test_short_contexts_are_not_split_and_have_no_partial_results():
    assert attention_shape(64, 128, 8, 64, 16, 2, H100_SMS).num_slots == 0
    assert attention_shape(64, 129, 8, 64, 16, 2, H100_SMS).num_slots > 0


def splits_of(shape, query_lens, num_keys, group, num_kv_heads):
    """(units, splits) of every request, as `attention_work.cuh` defines them."""
    units = [-(-n * group // shape.tile_rows) * num_kv_heads for n in query_lens]
    tiles = [-(-n // KEYS_PER_TILE) for n in num_keys]
    total = sum(u * n for u, n in zip(units, tiles, strict=True))
    budget = max(shape.wave - sum(units), shape.wave // 2, 1)
    low, high = (max(-(-total // n), shape.min_split_tiles) for n in (shape.wave, budget))
    for _ in range(3):
        middle = (low + high) // 2
        if low < high and sum(u * -(-n // middle) for u, n in zip(units, tiles, strict=True)) <= shape.wave:
            high = middle
        elif low < high:
            low = middle + 1
    return [(u, min(max(-(-n // high), 1), shape.max_splits)) for u, n in zip(units, tiles, strict=True)]


@pytest.mark.parametrize(
    ("query_lens", "context", "capacity", "num_blocks", "num_splits"),
    [
        ((33,), 8192, 64, 260, 26),  # all multiprocessors, twice
        ((33,), 1024, 64, 90, 9),  # as short as splits may be
        ((64,), 8192, 64, 240, 15),
        ((8,), 8192, 8, 64, 32),  # a block for half of them: more splits take longer to merge than they save
        ((8,), 32_768, 8, 64, 32),
        ((8,) * 32, 2048, 256, 256, 4),
        ((1,) * 64, 8192, 64, 256, 2),
    ],
)
def test_the_work_that_is_there_fills_the_gpu_whatever_was_captured(
    query_lens, context, capacity, num_blocks, num_splits
):
    """Rank 0 of a 70B over 7, from graphs of a capacity of 32k tokens."""
    shape = attention_shape(capacity, 33_280, min(capacity, 64), capacity, 16, 2, H100_SMS)
    found = splits_of(shape, query_lens, [context + n for n in query_lens], 8, 2)
    assert {splits for _, splits in found} == {num_splits}
    assert sum(units * splits for units, splits in found) == num_blocks
    assert shape.num_blocks <= 460  # blocks that return at once are few


@pytest.mark.parametrize(("max_keys", "num_splits"), [(33_280, 32), (33_281, 64), (131_072, 64)])
def test_graphs_for_long_contexts_split_them_into_more(max_keys, num_splits):
    shape = attention_shape(8, max_keys, 1, 8, 16, 2, H100_SMS)
    assert splits_of(shape, (8,), [max_keys], 8, 2) == [(2, num_splits)]


@given(
    requests=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 130_000)), min_size=1, max_size=70),
    padding=st.integers(0, 64),
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 12),
    wave=st.integers(1, 300),
    tile_rows=st.sampled_from((16, 64, 128)),
    min_split_keys=st.integers(1, 300),
)
def test_no_batch_has_more_blocks_or_partial_results_than_its_bounds_allow(
    requests, padding, kv_heads, group, wave, tile_rows, min_split_keys
):
    query_lens, contexts = zip(*requests, strict=True)
    num_keys = [c + n for c, n in zip(contexts, query_lens, strict=True)]
    bounds = (max(num_keys) + padding, len(requests) + padding, sum(query_lens) + padding)
    shape = shape_of_tiles(tile_rows, wave, min_split_keys, *bounds, kv_heads * group, kv_heads)
    found = splits_of(shape, query_lens, num_keys, group, kv_heads)
    assert sum(units * splits for units, splits in found) <= shape.num_blocks
    assert sum(units * splits for units, splits in found if splits > 1) <= shape.num_slots


def test_the_device_splits_as_the_definition_says():
    """Which slots of partial results are written tells which requests were split into how many parts."""
    case = AttentionCase("mixed", (300, 40, 0, 640), (5, 1, 20, 17), num_splits=3)
    prepared, shape = prepare_attention(case, torch.device("cpu")), case_shape(case)
    source_kernels().launch(prepared.plans[:1])
    num_keys = [c + n for c, n in zip(case.context_lens, case.query_lens, strict=True)]
    found = splits_of(shape, case.query_lens, num_keys, 4, 2)
    assert [splits for _, splits in found] == [3, 1, 1, 6]
    written = ~prepared.plans[0].arguments[11].isnan().all(dim=1)  # partial_lse
    expected = sum(units * splits for units, splits in found if splits > 1)
    assert written.nonzero().flatten().tolist() == list(range(expected))


def test_attention_fits_the_shared_memory_of_every_target():
    for head_dim in HEAD_DIMS:
        combined = 4 * 16 * (2 * 4 + head_dim)  # with 16 rows: the warps' maxima, sums and rows
        assert (
            combined <= 4 * KEYS_PER_TILE * head_dim
        )  # the tiles as they lie in a cache in FP8, whose place they take
        assert shared_bytes(head_dim, True) <= shared_bytes(head_dim) <= min(SHARED_BYTES.values())


@pytest.mark.parametrize(
    ("num_rows", "chunks"), [(1, 4), (1536, 4), (1537, 2), (3073, 1), (MAX_COMMIT_ROWS, 1)]
)
def test_commit_stages_fewer_columns_when_there_are_many_rows(num_rows, chunks):
    slots = torch.zeros(num_rows, dtype=torch.int64)
    plan = plan_kv_commit(torch.zeros(3, 2, 4, 16, 2, 64).bfloat16(), slots, slots)
    assert plan.shared_bytes == num_rows * chunks * 16 <= COMMIT_SHARED_BYTES
    assert plan.grid == (256 // (16 * chunks), 6, 1)
    assert plan.arguments[-1] == np.int32(chunks)


@pytest.mark.parametrize(
    ("rows", "unit"),
    [
        (torch.zeros(4, 8), 16),
        (torch.zeros(4, 9), 4),
        (torch.zeros(4, 5).bfloat16(), 2),
        (torch.zeros(4, 12)[:, 4:], 16),  # a slice whose stride and start are aligned
        (torch.zeros(4, 12)[:, 3:], 4),
    ],
)
def test_rows_are_copied_in_the_largest_unit_that_divides_them(rows, unit):
    out = torch.empty(2, rows.shape[1], dtype=rows.dtype)
    plan = plan_gather_rows(rows, torch.tensor([0, 3]), out)
    assert plan.kernel == f"gather_rows_{unit}"
    assert plan.arguments[3] * unit == out[0].nbytes


@pytest.mark.parametrize(
    ("out_features", "in_features", "splits"),
    [
        (1792, 8192, 4),  # rank 0 of a 70B over 7
        (8192, 1280, 1),
        (8192, 8192, 1),
        (8192, 4096, 1),
        (64, 8192, 32),
        (57344, 8192, 1),
        (64, 16, 1),
        (1, 1 << 20, MAX_SPLITS),
    ],
)
def test_columns_are_split_where_features_are_too_few_for_a_gpu(out_features, in_features, splits):
    assert column_splits(out_features, in_features, 8, H100_SMS) == splits


def test_the_large_products_are_split_as_an_h100_splits_them():
    for case in LARGE_NARROW_CASES:
        assert case.num_splits == column_splits(case.out_features, case.in_features, 8, H100_SMS), case.name
    for case in LARGE_INT4_CASES:
        assert case.num_splits == column_splits(case.out_features, case.in_features, 4, H100_SMS), case.name


@pytest.mark.parametrize(("shared_kib", "stages"), [(96, {2, 3, 4}), (163, {3, 4, 6}), (227, {4, 6})])
def test_a_ring_has_as_many_stages_as_fit(shared_kib, stages):
    assert min(SHARED_BYTES.values()) >= EVERYWHERE
    found = set()
    for case in NARROW_CASES:
        given = replace(case, shared_bytes=shared_kib << 10)
        plan = prepare_narrow_matmul(given, torch.device("cpu")).plans[0]
        assert plan.shared_bytes <= shared_kib << 10
        found.add(int(plan.arguments[14]))
    assert found == stages


@pytest.mark.parametrize(("shared_kib", "stages"), [(96, {2, 3, 4, 6}), (163, {3, 4, 6}), (227, {4, 6})])
def test_a_ring_of_4_bits_has_as_many_stages_as_fit(shared_kib, stages):
    found = set()
    for case in INT4_CASES:
        given = replace(case, shared_bytes=shared_kib << 10)
        plan = prepare_int4_matmul(given, torch.device("cpu")).plans[0]
        assert plan.shared_bytes <= shared_kib << 10
        found.add(int(plan.arguments[10]))
    assert found == stages
