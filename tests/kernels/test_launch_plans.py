"""The plans, which need no GPU: tiles, splits, shared memory, units of copying."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.kernels.gather_rows import plan_gather_rows
from outrider.kernels.kv_commit import plan_kv_commit
from outrider.kernels.launch_plans import COMMIT_SHARED_BYTES, MAX_COMMIT_ROWS
from outrider.kernels.tree_attention import HEAD_DIMS, KEYS_PER_TILE, attention_shape
from support.kernel_table import SHARED_BYTES

H100_SMS = 132


@pytest.mark.parametrize(
    ("nodes", "heads_per_kv", "tile_rows", "num_row_tiles"),
    [
        (1, 8, 16, 1),
        (2, 8, 16, 1),
        (3, 8, 64, 1),
        (8, 8, 64, 1),
        (9, 8, 128, 1),
        (64, 8, 128, 4),
        (5, 3, 16, 1),
    ],
)
def test_tiles_follow_the_rows(nodes, heads_per_kv, tile_rows, num_row_tiles):
    shape = attention_shape(nodes, 8192, 1, heads_per_kv, 1, H100_SMS)
    assert (shape.tile_rows, shape.num_row_tiles) == (tile_rows, num_row_tiles)


@pytest.mark.parametrize(
    ("nodes", "keys", "batch", "num_splits"),
    [
        (1, 8192, 1, 32),  # decoding alone: as many as there may be
        (1, 8192, 32, 9),  # 32 blocks already: up to two per multiprocessor
        (1, 8192, 300, 1),
        (1, 300, 1, 1),  # too short to divide
        (64, 8192, 1, 8),  # 512 rows: more partial results would cost more than the keys
        (512, 512, 1, 1),  # a prompt chunk
    ],
)
def test_splits_fill_the_gpu_and_stay_cheap(nodes, keys, batch, num_splits):
    assert attention_shape(nodes, keys, batch, 8, 1, H100_SMS).num_splits == num_splits


@given(
    nodes=st.integers(1, 600),
    keys=st.integers(1, 130_000),
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 12),
)
def test_every_shape_covers_the_rows_and_partial_results_cost_no_more_than_the_keys(
    nodes, keys, batch, kv_heads, group
):
    shape = attention_shape(nodes, max(keys, nodes), batch, kv_heads * group, kv_heads, H100_SMS)
    rows = nodes * group
    assert shape.tile_rows * shape.num_row_tiles >= rows
    assert shape.tile_rows * (shape.num_row_tiles - 1) < rows
    assert shape.num_splits == 1 or 2 * 4 * shape.num_splits * rows <= 4 * max(keys, nodes)


def test_attention_fits_the_shared_memory_of_every_target():
    for tile_rows, keys in KEYS_PER_TILE.items():
        for head_dim in HEAD_DIMS:
            needed = 2 * 2 * keys * (head_dim + 8) * 2
            combined = (
                4 * 16 * (2 * 4 + head_dim) if tile_rows == 16 else 0
            )  # the warps' maxima, sums and rows
            assert combined <= needed <= min(SHARED_BYTES.values())


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
