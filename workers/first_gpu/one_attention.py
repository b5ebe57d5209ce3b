"""Attention as a rank of a 70B makes it, alone: 16 query and 2 KV heads of 128.

`python -m outrider.workers.first_gpu.one_attention` launches it once for a profiler to look at: 64 rows of one
sequence behind 8k tokens. Part 10 times it by rows, sequences and context, also with other tiles and splits than the
chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.attention_work import (
    BLOCKS_PER_SM,
    MIN_KEYS_PER_SPLIT,
    AttentionShape,
    attention_shape,
    shape_of_tiles,
)
from outrider.kernels.roofline import least_time_s, roofline_of
from outrider.kernels.tree_attention import plan_tree_attention, tree_attention
from outrider.workers.first_gpu.expected import Figure
from outrider.workers.first_gpu.report import Row, milliseconds, not_run
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.first_gpu.trees import PAGE_SIZE, chain, trees_of
from outrider.workers.model.batch import build_batch, lay_out
from outrider.workers.model.cuda_graphs import MAX_SEQUENCES, TARGET_ROWS, words_for
from outrider.workers.model.static_batch import GraphCapacity, StaticBatch

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16


def attend(device: torch.device, num_rows: int, context: int, dtype: torch.dtype, use_kernel: bool) -> Tensor:
    """[num_rows, 16, 128] of random queries, keys and values."""
    num_pages = -(-(context + num_rows) // PAGE_SIZE)
    tables, rows = trees_of([range(num_pages)], context, chain(num_rows), [1] * num_rows)
    batch = build_batch(tables, rows, device).tree
    q = torch.randn(num_rows, HEADS, HEAD_DIM, dtype=dtype, device=device)
    pages = torch.randn(2, num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)
    return tree_attention(q, pages[0], pages[1], batch, SCALE, use_kernel=use_kernel)


def attention_times(setting: Setting) -> list[Row]:
    """All layers' attention and merges, captured for the capacity that the target captures, by batch and choice."""
    if not setting.has_kernels:
        return [not_run("attention alone", "needs a GPU")]
    return [row for case in setting.sizes.attended for row in _times_of(setting, *case)]


def _times_of(setting: Setting, num_rows: int, num_sequences: int, context: int) -> list[Row]:
    sizes, device = setting.sizes, setting.device
    each = num_rows // num_sequences
    pages_each = -(-(context + each) // PAGE_SIZE)
    num_pages = pages_each * num_sequences
    shuffled = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).tolist()
    parts = [shuffled[b * pages_each : (b + 1) * pages_each] for b in range(num_sequences)]
    rows_captured = next(rows for rows in TARGET_ROWS if rows >= num_rows)
    sequences_captured, max_keys = min(rows_captured, MAX_SEQUENCES), sizes.large.max_context
    capacity = GraphCapacity(
        rows_captured, sequences_captured, -(-max_keys // PAGE_SIZE), words_for(rows_captured), max_keys
    )
    static = StaticBatch(capacity, PAGE_SIZE, device)
    static.fill(lay_out(*trees_of(parts, context, chain(each), [1] * each)))
    # As many layers as are more than a GPU's cache: none is in it when its turn comes.
    layer_bytes = 2 * num_pages * PAGE_SIZE * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    num_layers = min(sizes.large.num_layers, -(-sizes.attended_bytes // layer_bytes))
    pages_shape = (num_layers, 2, num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    pages = torch.randn(pages_shape, dtype=DTYPE, device=device)
    q = torch.randn(rows_captured, HEADS, HEAD_DIM, dtype=DTYPE, device=device)
    out, gpu = torch.empty_like(q), setting.open_gpu(device)
    num_keys = num_sequences * (context + each)
    flops = 4 * each * HEADS * HEAD_DIM * num_keys
    roofline = roofline_of(torch.cuda.get_device_name(device) if setting.on_gpu else "cpu")
    least = least_time_s(2 * num_keys * KV_HEADS * HEAD_DIM * DTYPE.itemsize, flops, roofline)
    rows = []
    for choice, shape in _shapes(setting, rows_captured, sequences_captured, max_keys).items():
        partial_lse = torch.empty(shape.num_slots, shape.tile_rows, device=device)
        partial_out = torch.empty(*partial_lse.shape, HEAD_DIM, device=device)
        plans = [
            plan
            for layer in pages
            for plan in plan_tree_attention(
                q,
                layer[0],
                layer[1],
                static.batch.tree,
                SCALE,
                0,
                0.0,
                1.0,
                shape,
                out,
                partial_out,
                partial_lse,
            )
        ]
        seconds = gpu.median_time_s(plans) / num_layers * sizes.large.num_layers
        name = (
            f"{each * num_sequences} rows, {num_sequences} sequences, context {context}, all layers: {choice}"
        )
        rows.append(milliseconds(name, seconds, Figure(least_ms=least * sizes.large.num_layers * 1e3)))
    return rows


def _shapes(setting: Setting, num_rows: int, num_sequences: int, max_keys: int) -> dict[str, AttentionShape]:
    """What is chosen, and what could be: one thing is different at a time."""
    num_sms = torch.cuda.get_device_properties(setting.device).multi_processor_count if setting.on_gpu else 2
    bounds = (max_keys, num_sequences, num_rows, HEADS, KV_HEADS)
    chosen = attention_shape(num_rows, *bounds, num_sms)
    other_rows = 64 if chosen.tile_rows == 128 else 128
    wave = chosen.wave
    others = (
        (other_rows, BLOCKS_PER_SM[other_rows] * num_sms, MIN_KEYS_PER_SPLIT),
        (chosen.tile_rows, wave // 2, MIN_KEYS_PER_SPLIT),
        (chosen.tile_rows, 2 * wave, MIN_KEYS_PER_SPLIT),
        (chosen.tile_rows, wave, MIN_KEYS_PER_SPLIT // 2),
        (chosen.tile_rows, wave, 2 * MIN_KEYS_PER_SPLIT),
        (chosen.tile_rows, wave, max_keys),
    )
    names = {f"chosen ({chosen.tile_rows} rows a tile, wave of {wave}, {MIN_KEYS_PER_SPLIT} keys)": chosen}
    for tile_rows, blocks, keys in others:
        label = "not split" if keys == max_keys else f"{keys} keys"
        names[f"{tile_rows} rows a tile, wave of {blocks}, {label}"] = shape_of_tiles(
            tile_rows, blocks, keys, *bounds
        )
    return names


if __name__ == "__main__":
    attend(torch.device("cuda"), 64, 8192, DTYPE, use_kernel=True)
    torch.cuda.synchronize()
