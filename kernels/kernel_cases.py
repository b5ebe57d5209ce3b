"""Checks of every kernel, see `prepared.py`.

A case is prepared on a device, its plans are launched by whoever can (a CPU executor, the GPU), then `verify` tells
what is wrong.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from outrider.kernels.attention_cases import (
    ATTENTION_CASES,
    AttentionCase,
    attention_in_float64,
    build_attention_inputs,
)
from outrider.kernels.attention_work import AttentionShape, shape_of_tiles
from outrider.kernels.gather_rows import plan_gather_rows
from outrider.kernels.grow_cases import prepare_grow_trees
from outrider.kernels.int4_cases import INT4_CASES, Int4Case, prepare_int4_matmul
from outrider.kernels.kv_commit import plan_kv_commit
from outrider.kernels.launch_plans import FP8
from outrider.kernels.narrow_cases import NARROW_CASES, NarrowCase, prepare_narrow_matmul
from outrider.kernels.prepared import Check, Guards, PreparedCase
from outrider.kernels.rope_append import plan_rope_append, round_to_fp8
from outrider.kernels.row_cases import prepare_add_rms_norm, prepare_round_rows, prepare_silu_mul
from outrider.kernels.sampling_cases import prepare_sample_shard
from outrider.kernels.tree_attention import plan_tree_attention
from outrider.kernels.tree_batch import TreeBatch

# Largest error of a row of the output relative to the row: rounding of the result and of the softmax weights to the
# element type. Measured on the CPU executors over 400 random cases: see tests/kernels/test_on_cpu.py.
ATTENTION_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def prepare_attention(case: AttentionCase, device: torch.device) -> PreparedCase:
    inputs = build_attention_inputs(case)
    guards = Guards(device)
    num_queries, num_heads, head_dim = inputs.q.shape
    shape = case_shape(case)
    out = guards.empty((num_queries, num_heads, head_dim), case.dtype)
    plans = plan_tree_attention(
        inputs.q.to(device),
        inputs.k_pages.to(device),
        inputs.v_pages.to(device),
        batch_to(inputs.batch, device),
        case.scale,
        case.window,
        case.soft_cap,
        case.value_scale,
        shape,
        out,
        guards.empty((shape.num_slots, shape.tile_rows, head_dim), torch.float32),
        guards.empty((shape.num_slots, shape.tile_rows), torch.float32),
    )
    check = Check("out", out, _in_float64(case), ATTENTION_TOLERANCE[case.dtype])
    num_keys = [c + t for c, t in zip(case.context_lens, case.tree_lens, strict=True)]
    kv_bytes = 2 * case.cache_dtype.itemsize * sum(num_keys) * case.num_kv_heads * head_dim
    flops = sum(4 * n * q * num_heads * head_dim for n, q in zip(num_keys, case.query_lens, strict=True))
    return PreparedCase(
        f"tree_attention: {case.name}",
        "tree_attention_fp8" if case.narrow else "tree_attention",
        plans,
        (check,),
        tuple(guards.buffers),
        kv_bytes + 4 * out.numel(),
        flops,
    )


def case_shape(case: AttentionCase) -> AttentionShape:
    """Tiles that the rows nearly fill, and a wave so large that the keys are split as the case says."""
    group = case.num_heads // case.num_kv_heads
    rows = max(case.query_lens) * group
    tile_rows = 16 if rows <= 16 else 64 if rows <= 64 else 128
    num_units = sum(-(-n * group // tile_rows) for n in case.query_lens) * case.num_kv_heads
    num_keys = max(c + t for c, t in zip(case.context_lens, case.tree_lens, strict=True))
    min_split_keys = num_keys if case.num_splits == 1 else 1
    return shape_of_tiles(
        tile_rows,
        num_units * (case.num_splits + 1),
        min_split_keys,
        num_keys,
        len(case.query_lens),
        sum(case.query_lens),
        case.num_heads,
        case.num_kv_heads,
    )


@cache
def _in_float64(case: AttentionCase) -> Tensor:
    """Computed once: a case is prepared anew for every launch, and this takes longest."""
    return attention_in_float64(case, build_attention_inputs(case))


def batch_to(batch: TreeBatch, device: torch.device) -> TreeBatch:
    """The batch with its tensors on another device."""
    return TreeBatch(
        page_table=batch.page_table.to(device),
        context_lens=batch.context_lens.to(device),
        tree_lens=batch.tree_lens.to(device),
        query_indptr=batch.query_indptr.to(device),
        ancestors=batch.ancestors.to(device),
        depths=batch.depths.to(device),
        page_size=batch.page_size,
        host_context_lens=batch.host_context_lens,
        host_tree_lens=batch.host_tree_lens,
        host_query_lens=batch.host_query_lens,
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float64."""
    low, high = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1)


def prepare_rope_append(dtype: torch.dtype, device: torch.device) -> PreparedCase:
    """Queries, keys and values as slices of one fused projection; one node is padding (row -1)."""
    random = torch.Generator().manual_seed(1)
    N, HQ, HK, D, P, PAGE = 6, 9, 3, 64, 5, 7
    fused = torch.randn(N, HQ + 2 * HK, D, generator=random).to(dtype)
    q, k, v = fused.split((HQ, HK, HK), dim=1)
    angles = torch.rand(N, D // 2, generator=random) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    kv_rows = torch.tensor([33, 0, -1, 7, 20, 13])
    pages = torch.randn(2, P, PAGE, HK, D, generator=random).to(dtype)

    expected = pages.double().view(2, P * PAGE, HK, D).clone()
    written = kv_rows >= 0
    expected[0, kv_rows[written]] = _rotated(k, cos, sin)[written]
    expected[1, kv_rows[written]] = v.double()[written]
    guards = Guards(device)
    moved = fused.to(device)
    q, k, v = moved.split((HQ, HK, HK), dim=1)
    q_rotated = guards.empty((N, HQ, D), dtype)
    k_pages, v_pages = guards.copy(pages[0]), guards.copy(pages[1])
    plan = plan_rope_append(
        q, k, v, cos.to(device), sin.to(device), kv_rows.to(device), k_pages, v_pages, 1.0, 1.0, q_rotated
    )
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]  # one rounding to the type
    checks = (
        Check("q", q_rotated, _rotated(fused[:, :HQ], cos, sin), tolerance),
        Check("k_pages", k_pages.view(P * PAGE, -1), expected[0].flatten(1), tolerance),
        Check("v_pages", v_pages.view(P * PAGE, HK, D), expected[1].to(dtype), 0),
    )
    num_bytes = 2 * 2 * moved.numel()
    name = f"rope_append: {str(dtype).removeprefix('torch.')}"
    return PreparedCase(name, "rope_append", (plan,), checks, tuple(guards.buffers), num_bytes, 0)


def prepare_rope_append_fp8(dtype: torch.dtype, device: torch.device) -> PreparedCase:
    """A cache in FP8: the values are all that the type has but NaN, and some keys are cut off, too."""
    random = torch.Generator().manual_seed(5)
    N, HQ, HK, D, PAGE = 16, 8, 32, 128, 8
    q, k = (torch.randn(N, heads, D, generator=random).to(dtype) for heads in (HQ, HK))
    v = (
        torch.arange(1 << 16)
        .to(torch.uint16)
        .view(dtype)
        .nan_to_num(0.0, torch.inf, -torch.inf)
        .view(N, HK, D)
    )
    angles = torch.rand(N, D // 2, generator=random) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    kv_rows = torch.randperm(N, generator=random)
    key_scale, value_scale = 0.005, 1.0 if dtype == torch.bfloat16 else 0.75
    expected = torch.empty(2, N, HK, D, dtype=FP8)
    expected[0, kv_rows] = round_to_fp8(_rotated(k, cos, sin).to(dtype), key_scale)
    expected[1, kv_rows] = round_to_fp8(v, value_scale)
    guards = Guards(device)
    q_rotated = guards.empty((N, HQ, D), dtype)
    k_pages, v_pages = (guards.empty((N // PAGE, PAGE, HK, D), FP8) for _ in range(2))
    q, k, v, cos, sin, kv_rows = (x.to(device) for x in (q, k, v, cos, sin, kv_rows))
    plan = plan_rope_append(q, k, v, cos, sin, kv_rows, k_pages, v_pages, key_scale, value_scale, q_rotated)
    checks = (
        # A key between two numbers may become either: an eighth of one among 128.
        Check("k_pages", k_pages.view(N * HK, D), expected[0].double().view(N * HK, D), 2e-2),
        Check("v_pages", v_pages.view(N, HK, D), expected[1], 0),
    )
    num_bytes = 2 * sum(x.numel() for x in (q, q, k, v)) + k_pages.nbytes + v_pages.nbytes
    name = f"rope_append: {str(dtype).removeprefix('torch.')}, FP8"
    return PreparedCase(name, "rope_append_fp8", (plan,), checks, tuple(guards.buffers), num_bytes, 0)


def prepare_kv_commit(num_rows: int, device: torch.device) -> PreparedCase:
    """Rows move among kv_rows that are sources and targets at once; the last pair is padding."""
    random = torch.Generator().manual_seed(2)
    L, P, PAGE, HK, D = 2, num_rows // 3 + 3, 5, 3, 64
    kv = torch.randn(L, 2, P, PAGE, HK, D, generator=random).bfloat16()
    chosen = torch.randperm(P * PAGE, generator=random)[:num_rows]
    source = torch.cat((chosen, torch.tensor([-1])))
    target = torch.cat((chosen.roll(1), torch.tensor([-1])))
    expected = kv.clone().view(L, 2, P * PAGE, HK, D)
    expected[:, :, target[:-1]] = expected[:, :, source[:-1]].clone()
    guards = Guards(device)
    moved = guards.copy(kv)
    plan = plan_kv_commit(moved, source.to(device), target.to(device))
    check = Check("kv", moved, expected.view(kv.shape), 0)
    num_bytes = 2 * 2 * L * num_rows * HK * D * 2
    name = f"kv_commit: {num_rows} rows"
    return PreparedCase(name, "kv_commit", (plan,), (check,), tuple(guards.buffers), num_bytes, 0)


def prepare_gather_rows(row_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> PreparedCase:
    random = torch.Generator().manual_seed(3)
    rows = torch.randn(11, *row_shape, generator=random).to(dtype)
    indices = torch.tensor([10, 0, 3, 3, 7])
    guards = Guards(device)
    out = guards.empty((5, *row_shape), dtype)
    plan = plan_gather_rows(rows.to(device), indices.to(device), out)
    check = Check("out", out, rows[indices], 0)
    name = f"gather_rows: rows of {out[0].numel() * dtype.itemsize} bytes"
    return PreparedCase(name, "gather_rows", (plan,), (check,), tuple(guards.buffers), 2 * out.nbytes, 0)


Preparation = Callable[[torch.device], PreparedCase]


def kernel_cases(
    attention_cases: Sequence[AttentionCase] = ATTENTION_CASES,
    narrow_cases: Sequence[NarrowCase] = NARROW_CASES,
    int4_cases: Sequence[Int4Case] = INT4_CASES,
) -> list[Preparation]:
    """Every case of every kernel, to be prepared on a device."""
    return [
        *(partial(prepare_attention, case) for case in attention_cases),
        *(
            partial(prepare, dtype)
            for prepare in (prepare_rope_append, prepare_rope_append_fp8)
            for dtype in (torch.bfloat16, torch.float16)
        ),
        *(partial(prepare_kv_commit, num_rows) for num_rows in (1, 9, 400)),
        partial(prepare_gather_rows, (24,), torch.float32),
        partial(prepare_gather_rows, (3, 6), torch.float16),
        partial(prepare_gather_rows, (5,), torch.bfloat16),
        *(
            partial(prepare, num_rows, width, dtype)
            for prepare in (prepare_add_rms_norm, prepare_silu_mul)
            for num_rows, width, dtype in (
                (3, 77, torch.bfloat16),
                (2, 5000, torch.bfloat16),
                (4, 520, torch.float16),
                (2, 130, torch.float32),
            )
        ),
        partial(prepare_round_rows, 7, 77, torch.bfloat16),
        partial(prepare_round_rows, 7, 4104, torch.bfloat16, bound=2.0, least_scale=1e-3),
        partial(prepare_round_rows, 5, 520, torch.float16),
        partial(prepare_round_rows, 5, 130, torch.float32),
        partial(prepare_round_rows, 5, 2056, torch.float32, static_scale=0.03),
        partial(prepare_round_rows, 7, 1024, torch.bfloat16, width=128, by_column=True),
        partial(prepare_round_rows, 5, 648, torch.bfloat16, width=128, by_column=True),
        partial(prepare_round_rows, 4, 200, torch.float16, width=16, bound=3.0),
        partial(prepare_round_rows, 4, 333, torch.bfloat16, width=20),
        partial(prepare_round_rows, 4, 512, torch.float32, width=128, by_column=True),
        *(partial(prepare_narrow_matmul, case) for case in narrow_cases),
        *(partial(prepare_int4_matmul, case) for case in int4_cases),
        partial(prepare_sample_shard, 5, 0),
        partial(prepare_sample_shard, 1501, 152_000),
        partial(prepare_sample_shard, 600, 17, step=5, coarse=True),
        partial(prepare_grow_trees, 1, 6, 4),
        partial(prepare_grow_trees, 5, 3, 2, has_table=True),
    ]
