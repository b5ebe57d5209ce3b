"""Every kernel against float64 on both CPU executors: its source, and the PTX that NVRTC makes of it per target.

Not run on a GPU; `outrider doctor --gpu` and `pytest -m gpu` run the same cases there.
"""

import random

import pytest
import torch

from outrider.kernels.attention_cases import LARGE_ATTENTION_CASES, AttentionCase
from outrider.kernels.compiler import SOURCES, TARGETS, load_sources
from outrider.kernels.kernel_cases import PreparedCase, kernel_cases, prepare_attention
from support.cuda_on_cpu.executor import SCHEDULES, Executor, Schedule, kernel_names
from support.cuda_on_cpu.kernels import ptx_kernels, source_kernels

CPU = torch.device("cpu")
# Both executors compute the same numbers in the same order up to fused multiply-adds; where one of them falls on a
# rounding boundary a bf16 result moves by 2^-8 of itself. Largest seen over 400 random cases: 7e-5.
EXECUTOR_TOLERANCE = 1e-4

CASES = {case(CPU).name: case for case in kernel_cases()}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(executor: Executor, case: PreparedCase, schedule: Schedule) -> list[torch.Tensor]:
    executor.launch(case.plans, schedule)
    assert case.verify() == []
    return [output.double() for output in case.outputs()]


def difference(outputs: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    pairs = [(x.nan_to_num(), y.nan_to_num()) for x, y in zip(outputs, others, strict=True)]
    return max(((x - y).norm() / y.norm().clamp_min(1e-30)).item() for x, y in pairs)


@pytest.mark.parametrize("name", CASES)
def test_source_agrees_with_float64_under_every_schedule(name):
    expected = run(source_kernels(), CASES[name](CPU), SCHEDULES[0])
    for schedule in SCHEDULES[1:]:
        assert difference(run(source_kernels(), CASES[name](CPU), schedule), expected) == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_ptx_agrees_with_float64_and_with_the_source(name, target):
    expected = run(source_kernels(), CASES[name](CPU), SCHEDULES[0])
    for schedule in (SCHEDULES[0], SCHEDULES[3], SCHEDULES[4]):
        outputs = run(ptx_kernels(target), CASES[name](CPU), schedule)
        assert difference(outputs, expected) <= EXECUTOR_TOLERANCE


def random_case(rnd: random.Random) -> AttentionCase:
    num_requests = rnd.choice((1, 2, 3))
    group, num_kv_heads = rnd.choice((1, 2, 3, 5, 8)), rnd.choice((1, 2, 3))
    head_dim = rnd.choice((64, 64, 128))
    return AttentionCase(
        "random",
        context_lens=tuple(rnd.choice((0, 1, 15, 16, 31, 32, 33, 64, 100, 257)) for _ in range(num_requests)),
        query_lens=tuple(rnd.choice((1, 1, 2, 7, 16, 17, 33, 64, 65)) for _ in range(num_requests)),
        cached_lens=tuple(rnd.choice((0, 0, 1, 30, 70)) for _ in range(num_requests)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=rnd.choice((1, 3, 4, 16, 64)),
        dtype=rnd.choice((torch.bfloat16, torch.bfloat16, torch.float16)),
        window=rnd.choice((0, 0, 0, 1, 2, 5, 33, 64)),
        soft_cap=rnd.choice((0.0, 0.0, 0.0, 20.0)),
        num_splits=rnd.choice((1, 2, 3, 9)),
        query_scale=rnd.choice((1.0, 1.0, 8.0, 60.0)),
        chain=rnd.random() < 0.3,
        seed=rnd.randrange(1 << 30),
    )


def fuzz(seed: int, num_cases: int, target: str) -> None:
    rnd = random.Random(seed)
    for _ in range(num_cases):
        case = random_case(rnd)
        outputs = [
            run(executor, prepare_attention(case, CPU), rnd.choice(SCHEDULES))
            for executor in (source_kernels(), ptx_kernels(target))
        ]
        assert difference(*outputs) <= 3 * EXECUTOR_TOLERANCE, case


def test_random_batches_of_trees():
    fuzz(seed=0, num_cases=60, target="sm_90a")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90a", "sm_100"])
def test_many_random_batches_of_trees(target):
    fuzz(seed=1, num_cases=400, target=target)


@pytest.mark.parametrize("case", LARGE_ATTENTION_CASES, ids=lambda case: case.name)
def test_large_batches(case):
    expected = run(source_kernels(), prepare_attention(case, CPU), SCHEDULES[0])
    assert (
        difference(run(ptx_kernels("sm_90a"), prepare_attention(case, CPU), SCHEDULES[1]), expected)
        <= EXECUTOR_TOLERANCE
    )


def test_the_cases_use_every_kernel():
    defined = {name for stem in SOURCES for name in kernel_names(load_sources(stem), stem)}
    assert {plan.kernel for case in CASES.values() for plan in case(CPU).plans} == defined
