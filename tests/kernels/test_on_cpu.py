"""Every kernel against float64 on both CPU executors: its source, and the PTX that NVRTC makes of it per target.

Not run on a GPU; `outrider doctor --gpu` and `pytest -m gpu` run the same cases there.
"""

import math
import random
from functools import cache
from pathlib import Path

import pytest
import torch

from outrider.kernels.add_rms_norm import plan_add_rms_norm
from outrider.kernels.attention_cases import LARGE_ATTENTION_CASES, AttentionCase
from outrider.kernels.compiler import SOURCES, TARGETS, load_sources
from outrider.kernels.int4_cases import Int4Case, prepare_int4_matmul
from outrider.kernels.int4_matmul import CENTRE, GROUPS, packed_in_tiles, plan_int4_matmul
from outrider.kernels.kernel_cases import kernel_cases, prepare_attention
from outrider.kernels.launch_plans import FP8
from outrider.kernels.narrow_cases import NarrowCase, prepare_narrow_matmul
from outrider.kernels.narrow_matmul import MAX_ROWS, plan_narrow_matmul
from outrider.kernels.prepared import PreparedCase
from outrider.kernels.round_rows import plan_round_rows, round_rows
from outrider.kernels.row_cases import LEAST_SCALE, prepare_add_rms_norm, prepare_round_rows, prepare_silu_mul
from outrider.kernels.sampling_cases import prepare_sample_shard
from support.cuda_on_cpu.executor import SCHEDULES, Executor, Schedule, kernel_names
from support.cuda_on_cpu.kernels import OFTEN, ptx_kernels, source_kernels

CPU = torch.device("cpu")
# Both executors compute the same numbers in the same order up to fused multiply-adds and the last bit of a logarithm.
# Absolute, of everything in float32. Largest seen over 800 random cases: 5e-7 in attended values, and 1.5e-5, an ulp,
# in log-sum-exps near 200.
EXECUTOR_TOLERANCE = 1e-4
# Where such a difference falls on a rounding boundary of a 16-bit result, that one moves by an ulp of its own, more
# than the tolerance for values above 2^-6 (bf16) or 2^-3 (f16): for one such value among 64 that is a relative error
# of the output of up to 4e-4 (seen: 1.4e-4). So an ulp it may be, but of few values. (In float32 an ulp is more than
# the tolerance for sums above 1000 only.)
MOVED_FRACTION = 0.001  # besides one; largest seen: 6e-5

CASES = {case(CPU).name: case for case in kernel_cases()}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(executor: Executor, case: PreparedCase, schedule: Schedule) -> list[torch.Tensor]:
    """Outputs, and what attention over several splits leaves in float32 before it is merged and rounded."""
    executor.launch(case.plans, schedule)
    assert case.verify() == []
    attention = case.plans[0]
    partial = attention.arguments[10:12] if attention.source == "tree_attention" else ()
    return [*case.outputs(), *(x for x in partial if isinstance(x, torch.Tensor))]


def disagreements(results: list[torch.Tensor], others: list[torch.Tensor]) -> list[str]:
    """What is wrong between two executors, one line each."""
    problems = []
    for x, y in zip(results, others, strict=True):
        wide, other = x.double(), y.double()
        same = (wide == other) | (
            wide.isnan() & other.isnan()
        )  # infinities and places nobody wrote among them
        off = torch.where(same, 0.0, (wide - other).abs()).nan_to_num(float("inf"))
        moved = (off > EXECUTOR_TOLERANCE) & neighbours(x, y)
        wrong = (off > EXECUTOR_TOLERANCE) & ~moved
        if wrong.any():
            problems.append(f"{tuple(x.shape)} {x.dtype}: off by {off[wrong].max():.2e}")
        if moved.sum() > 1 + MOVED_FRACTION * x.numel():
            problems.append(f"{tuple(x.shape)} {x.dtype}: {moved.sum()} values moved by an ulp")
    return problems


def neighbours(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether two values have at most one ulp between them; integers are never neighbours."""
    if not x.is_floating_point():
        return torch.zeros(x.shape, dtype=torch.bool)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    bits, other = (t.contiguous().view(integer).long() for t in (x, y))
    magnitude = torch.iinfo(integer).max
    steps, other_steps = (torch.where(b < 0, -(b & magnitude), b) for b in (bits, other))  # -0.0 is 0.0
    return (steps - other_steps).abs() <= 1


@cache
def from_source(name: str) -> list[torch.Tensor]:
    """What the source computes, which is the same whatever it is compiled for."""
    return run(source_kernels(), CASES[name](CPU), SCHEDULES[0])


@cache
def check_libraries(name: str, libraries: frozenset[tuple[str, Path]]) -> None:
    """Once where targets share what was built for them: it would compute the same."""
    executor, expected = Executor(dict(libraries)), from_source(name)
    for schedule in (SCHEDULES[0], SCHEDULES[3], SCHEDULES[4]):
        assert disagreements(run(executor, CASES[name](CPU), schedule), expected) == []


@pytest.mark.parametrize("name", CASES)
def test_source_agrees_with_float64_under_every_schedule(name):
    expected = from_source(name)
    for schedule in SCHEDULES[1:]:
        results = run(source_kernels(), CASES[name](CPU), schedule)
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=() if t in OFTEN else pytest.mark.slow) for t in TARGETS]
)
@pytest.mark.parametrize("name", CASES)
def test_ptx_agrees_with_float64_and_with_the_source(name, target):
    libraries = ptx_kernels(target).libraries
    kernels = {plan.kernel for plan in CASES[name](CPU).plans}
    check_libraries(name, frozenset((kernel, libraries[kernel]) for kernel in kernels))


@pytest.mark.parametrize("target", ["source", "sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_in_fp8_is_read_as_it_is(dtype, target):
    """A query that sees one key alone gets its value; sm_80 has no instruction for it, as the later ones have."""
    case = AttentionCase("codes", (0, 0), (1, 1), num_heads=2, dtype=dtype, narrow=True)
    prepared = prepare_attention(case, CPU)
    k_pages, v_pages, page_table = prepared.plans[0].arguments[1:4]
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(2, 2, 64)
    v_pages.view(torch.uint8)[page_table[:, 0].long(), 0] = codes.view(torch.uint8)
    k_pages.view(torch.uint8).zero_()
    (source_kernels() if target == "source" else ptx_kernels(target)).launch(prepared.plans)
    (out,) = prepared.outputs()
    # 448 times the scale of the case fits; zeros lose their sign in a sum.
    expected = codes.to(dtype) * case.value_scale
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def random_case(rnd: random.Random) -> AttentionCase:
    num_requests = rnd.choice((1, 2, 3))
    group, num_kv_heads = rnd.choice((1, 2, 3, 5, 7, 8)), rnd.choice((1, 2, 3))
    head_dim = rnd.choice((64, 64, 128))
    return AttentionCase(
        "random",
        context_lens=tuple(rnd.choice((0, 1, 15, 16, 31, 32, 33, 64, 100, 257)) for _ in range(num_requests)),
        query_lens=tuple(rnd.choice((1, 1, 2, 7, 16, 17, 33, 64, 65)) for _ in range(num_requests)),
        cached_lens=tuple(rnd.choice((0, 0, 1, 30, 70)) for _ in range(num_requests)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=rnd.choice((1, 3, 4, 7, 16, 64)),
        dtype=rnd.choice((torch.bfloat16, torch.bfloat16, torch.float16)),
        window=rnd.choice((0, 0, 0, 1, 2, 5, 33, 64)),
        soft_cap=rnd.choice((0.0, 0.0, 0.0, 20.0)),
        num_splits=rnd.choice((1, 2, 3, 9)),
        query_scale=rnd.choice((1.0, 1.0, 8.0, 60.0)),
        chain=rnd.random() < 0.3,
        seed=rnd.randrange(1 << 30),
        narrow=rnd.random() < 0.3,
    )


def fuzz(seed: int, num_cases: int, target: str) -> None:
    rnd = random.Random(seed)
    for _ in range(num_cases):
        case = random_case(rnd)
        results = [
            run(executor, prepare_attention(case, CPU), rnd.choice(SCHEDULES))
            for executor in (source_kernels(), ptx_kernels(target))
        ]
        assert disagreements(*results) == [], case


def test_random_batches_of_trees():
    fuzz(seed=0, num_cases=30, target="sm_90a")


def test_random_rows():
    """Of any width, any number of them: and a row's bits are the same alone."""
    rnd = random.Random(2)
    for _ in range(30):
        dtype = rnd.choice((torch.bfloat16, torch.float16, torch.float32))
        size = rnd.choice((1, 2, 5)), rnd.choice((1, 7, 8, 31, 64, 333, 1000, 4104)), dtype
        for prepare in (prepare_add_rms_norm, prepare_silu_mul):
            seed = rnd.randrange(1 << 30)
            results = [
                run(executor, prepare(*size, CPU, seed), rnd.choice(SCHEDULES))
                for executor in (source_kernels(), ptx_kernels("sm_90a"))
            ]
            assert disagreements(*results) == [], (prepare, size)


def test_random_rows_are_rounded():
    """Of any width, in groups of any width, with any bounds, and any number of them."""
    rnd = random.Random(4)
    for _ in range(40):
        dtype = rnd.choice((torch.bfloat16, torch.float16, torch.float32))
        num_rows, columns = rnd.choice((1, 2, 5, 7)), rnd.choice((2, 7, 8, 31, 64, 333, 1000, 1024, 4104))
        kind = {
            "width": rnd.choice((None, None, rnd.randint(1, columns), min(128, columns))),
            "bound": rnd.choice((math.inf, 0.5, 1200.0)),
            "least_scale": rnd.choice((LEAST_SCALE, 1 / (448 * 512), 1.0)),
            "by_column": rnd.random() < 0.4,
            "seed": rnd.randrange(1 << 30),
        }
        if kind["width"] is None:
            kind["static_scale"] = rnd.choice((None, 0.01, 3.0))
        for executor in (source_kernels(), ptx_kernels(rnd.choice(("sm_80", "sm_90a")))):
            run(executor, prepare_round_rows(num_rows, columns, dtype, CPU, **kind), rnd.choice(SCHEDULES))


@pytest.mark.parametrize("target", ["source", "sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_rounded_as_torch_rounds_it(dtype, target):
    """All of them, NaN and infinities, too, by a scale that is no power of two, and by one that makes them large."""
    x = torch.arange(1 << 16).to(torch.uint16).view(dtype).view(32, 2048)
    executor = source_kernels() if target == "source" else ptx_kernels(target)
    for scale in (0.03, 1.0, 2.0**-20):
        expected, expected_scales = round_rows(x, 2048, math.inf, 0.0, scale, False)
        values, scales = torch.empty_like(expected), torch.empty_like(expected_scales)
        executor.launch([plan_round_rows(x, 2048, math.inf, 0.0, scale, values, scales)])
        assert torch.equal(scales, expected_scales)
        is_nan = expected.float().isnan()
        assert torch.equal(is_nan, values.float().isnan())
        same = values.view(torch.uint8) == expected.view(torch.uint8)
        assert bool((same | is_nan).all())


def test_random_products_with_matrices_of_8_bits():
    """Of any size, in rings of any number of stages, on both executors."""
    rnd = random.Random(4)
    for _ in range(24):
        narrow_rows, columns = rnd.random() < 0.5, 16 * rnd.choice((1, 3, 15, 16, 17, 40, 99, 130))
        group = rnd.choice((0, 64, 128, 128, 192))
        case = NarrowCase(
            num_rows=rnd.choice((1, 2, 8, 13, 16, 17, 39, 41, 64)),
            out_features=rnd.choice((1, 15, 64, 65, 129)),
            in_features=columns,
            narrow_rows=narrow_rows,
            dtype=FP8 if narrow_rows else rnd.choice((FP8, torch.int8)),
            group=group,
            x_by_group=narrow_rows and group > 0 and rnd.random() < 0.5,
            num_splits=rnd.randint(1, -(-columns // 256)),
            has_bias=rnd.random() < 0.5,
            shared_bytes=rnd.choice((96, 160, 227)) << 10,
        )
        results = [
            run(executor, prepare_narrow_matmul(case, CPU), rnd.choice(SCHEDULES))
            for executor in (source_kernels(), ptx_kernels("sm_90a"))
        ]
        assert disagreements(*results) == [], case


@pytest.mark.parametrize("target", ["source", "sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_every_number_of_8_bits_is_multiplied_as_it_is(dtype, target):
    """A row of x with a single one picks a column of the matrix, in which each number stands once."""
    weight = torch.arange(256).to(torch.uint8).view(dtype)[:, None].repeat(1, 16).contiguous()
    x = torch.eye(16).bfloat16()
    if dtype == FP8:
        weight.view(torch.uint8)[weight.float().isnan()] = 0  # would fill the sums of their rows
    out = torch.empty(16, 256).bfloat16()
    nothing = torch.empty(0)
    plans = plan_narrow_matmul(
        x, nothing, weight, torch.ones(256, 1), 16, nothing.bfloat16(), 1, 96 << 10, out, nothing
    )
    (source_kernels() if target == "source" else ptx_kernels(target)).launch(plans)
    assert torch.equal(out, weight.float().T.bfloat16())


def test_not_a_number_in_fp8_stays_one():
    values = torch.zeros(2, 2, 64)
    values[0, 0, 5] = values[1, 1, 40] = float("nan")
    x, weight = values.to(FP8)
    out, nothing = torch.empty(2, 2).bfloat16(), torch.empty(0)
    ones = torch.ones(2, 1)
    for kernels in (source_kernels(), ptx_kernels("sm_80"), ptx_kernels("sm_90a")):
        plans = plan_narrow_matmul(
            x, ones, weight, ones, 64, nothing.bfloat16(), 1, 96 << 10, out.zero_(), nothing
        )
        kernels.launch(plans)
        assert out.isnan().tolist() == [[True, True], [False, True]]


def test_a_product_of_a_row_is_the_same_among_any_others():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MAX_ROWS, 1600, generator=generator).bfloat16()
    weight = torch.randn(70, 1600, generator=generator).to(FP8)
    scales, bias = torch.rand(70, 13, generator=generator), torch.randn(70, generator=generator).bfloat16()

    def computed(rows: slice, shared_kib: int) -> torch.Tensor:
        given = x[rows]
        out, partial_out = torch.empty(len(given), 70).bfloat16(), torch.empty(3, len(given), 70)
        plans = plan_narrow_matmul(
            given, torch.empty(0), weight, scales, 128, bias, 3, shared_kib << 10, out, partial_out
        )
        source_kernels().launch(plans)
        return out

    together = computed(slice(0, MAX_ROWS), 227)
    for rows in (slice(0, 1), slice(5, 12), slice(20, 36), slice(30, 63)):
        assert torch.equal(computed(rows, 96), together[rows])


def test_random_products_with_matrices_of_4_bits():
    """Of any size, in rings of any number of stages, on both executors."""
    rnd = random.Random(6)
    for _ in range(24):
        group = rnd.choice(GROUPS)
        columns = max(group, 128) * rnd.choice((1, 2, 3, 5, 7, 10, 13))
        case = Int4Case(
            num_rows=rnd.choice((1, 2, 8, 13, 16, 17, 39, 41, 64)),
            out_features=rnd.choice((1, 8, 15, 64, 65, 129)),
            in_features=columns,
            group=group,
            num_splits=rnd.randint(1, -(-columns // 256)),
            has_bias=rnd.random() < 0.5,
            shared_bytes=rnd.choice((96, 160, 227)) << 10,
        )
        results = [
            run(executor, prepare_int4_matmul(case, CPU), rnd.choice(SCHEDULES))
            for executor in (source_kernels(), ptx_kernels("sm_90a"))
        ]
        assert disagreements(*results) == [], case


@pytest.mark.parametrize("target", ["source", "sm_80", "sm_90a"])
def test_every_number_of_4_bits_is_multiplied_as_it_is(target):
    """A row of x with a single one picks a column: of 16 features that have each value there, by scales and centres
    of many sizes and both signs."""
    places = torch.arange(128)
    values = ((torch.arange(16)[:, None] + places) % 16).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    of_groups = (
        torch.randn(4, 16, 2, generator=generator) * 2.0 ** torch.arange(-12, 4, 4)[:, None, None]
    ).bfloat16()
    scales, centres = of_groups.double().repeat_interleave(32, dim=0).unbind(2)
    expected = ((values.T.double() - CENTRE) * scales + centres).bfloat16()
    packed, out, nothing = packed_in_tiles(values), torch.empty(64, 16).bfloat16(), torch.empty(0)
    executor = source_kernels() if target == "source" else ptx_kernels(target)
    for first in (0, 64):
        x = torch.eye(128)[first : first + 64].bfloat16()
        plans = plan_int4_matmul(x, packed, of_groups, 32, nothing.bfloat16(), 1, 96 << 10, out, nothing)
        executor.launch(plans)
        assert torch.equal(out, expected[first : first + 64])


def test_a_product_with_4_bits_of_a_row_is_the_same_among_any_others():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MAX_ROWS, 1664, generator=generator).bfloat16()
    packed = packed_in_tiles(torch.randint(0, 16, (70, 1664), dtype=torch.uint8, generator=generator))
    of_groups = torch.randn(13, 72, 2, generator=generator).bfloat16()
    bias = torch.randn(70, generator=generator).bfloat16()

    def computed(rows: slice, shared_kib: int) -> torch.Tensor:
        given = x[rows]
        out, partial_out = torch.empty(len(given), 70).bfloat16(), torch.empty(3, len(given), 70)
        plans = plan_int4_matmul(given, packed, of_groups, 128, bias, 3, shared_kib << 10, out, partial_out)
        source_kernels().launch(plans)
        return out

    together = computed(slice(0, MAX_ROWS), 227)
    for rows in (slice(0, 1), slice(5, 12), slice(20, 36), slice(30, 63)):
        assert torch.equal(computed(rows, 96), together[rows])


@pytest.mark.parametrize("num_cases", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_random_shards_are_sampled(num_cases):
    """Every way to cut a row, of any size, with ties and without, on both executors."""
    rnd = random.Random(3)
    for _ in range(num_cases):
        size, offset = rnd.choice((21, 40, 333, 512, 513, 1000)), rnd.choice((0, 5, 120_000))
        kind = {"step": rnd.choice((1, 1, 3)), "coarse": rnd.random() < 0.5, "seed": rnd.randrange(1 << 30)}
        results = [
            run(executor, prepare_sample_shard(size, offset, CPU, **kind), rnd.choice(SCHEDULES))
            for executor in (source_kernels(), ptx_kernels("sm_90a"))
        ]
        assert disagreements(*results) == [], (size, kind)


def test_a_row_is_the_same_among_any_others():
    hidden, added = torch.randn(2, 9, 300).bfloat16()
    weight = torch.randn(300).bfloat16()

    def computed(rows: slice) -> torch.Tensor:
        outputs = [torch.empty_like(hidden[rows]) for _ in range(2)]
        plan = plan_add_rms_norm(hidden[rows], added[rows], weight, 1e-6, *outputs)
        source_kernels().launch([plan])
        return outputs[1]

    together = computed(slice(0, 9))
    assert all(torch.equal(computed(slice(n, n + 1))[0], together[n]) for n in range(9))
    total = hidden + added
    reference = torch.nn.functional.rms_norm(total, (300,), weight, 1e-6)
    assert (together != reference).float().mean() < 0.002  # sums in another order: a last bit now and then
    torch.testing.assert_close(together, reference, rtol=2**-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90a", "sm_100"])
def test_many_random_batches_of_trees(target):
    fuzz(seed=1, num_cases=400, target=target)


@pytest.mark.parametrize("case", LARGE_ATTENTION_CASES, ids=lambda case: case.name)
def test_large_batches(case):
    expected = run(source_kernels(), prepare_attention(case, CPU), SCHEDULES[0])
    results = run(ptx_kernels("sm_90a"), prepare_attention(case, CPU), SCHEDULES[1])
    assert disagreements(results, expected) == []


def test_the_comparison_of_executors_sees_what_it_must():
    one = torch.tensor([1.0, -2.0, 0.0, float("nan"), -float("inf")])
    assert disagreements([one], [one.clone()]) == []
    for wrong in (one + 2e-4, one.nan_to_num(0.0, 0.0, -1e4), one.nan_to_num(0.0)):
        assert disagreements([one], [wrong]) != []
    many = torch.ones(1000).bfloat16()
    for ulps, num, allowed in ((1, 2, True), (2, 1, False), (1, 3, False)):
        moved = many.clone()
        moved[:num] += ulps * 2**-7
        assert (disagreements([moved], [many]) == []) == allowed


def test_the_cases_use_every_kernel():
    defined = {name for stem in SOURCES for name in kernel_names(load_sources(stem), stem)}
    assert {plan.kernel for case in CASES.values() for plan in case(CPU).plans} == defined
