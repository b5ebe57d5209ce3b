"""The PTX executor runs PTX that Triton made, which is known to be right on hardware."""

import math

import numpy as np
import pytest
import torch

from outrider.kernels.launch_plans import LaunchPlan
from support.cuda_on_cpu.executor import SCHEDULES
from support.cuda_on_cpu.ptx.executor import ptx_executor

pytest.importorskip("triton", reason="Triton makes the PTX")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "f16"]
)
def test_triton_attention_runs_right_in_the_ptx_executor(dtype):
    from support.cuda_on_cpu.triton_attention import BLOCK_QUERIES, HEAD_DIM, NUM_WARPS, compile_for_sm80

    ptx, shared_bytes = compile_for_sm80(dtype)
    for instruction in ("mma.sync", "ldmatrix", "cp.async"):
        assert instruction in ptx
    executor = ptx_executor({"triton": ptx})
    random = torch.Generator().manual_seed(0)
    for num_rows in (5, 70, 128):
        q, k, v = (torch.randn(num_rows, HEAD_DIM, generator=random).to(dtype) for _ in range(3))
        scores = q.double() @ k.double().T / math.sqrt(HEAD_DIM)
        future = torch.ones(num_rows, num_rows, dtype=torch.bool).triu(1)
        expected = scores.masked_fill(future, -math.inf).softmax(-1) @ v.double()
        for schedule in SCHEDULES:
            out, scratch = torch.full((num_rows, HEAD_DIM), math.nan), torch.zeros(64)
            arguments = (
                q,
                k,
                v,
                out,
                np.int32(num_rows),
                np.float32(1 / math.sqrt(HEAD_DIM)),
                scratch,
                scratch,
            )
            grid = (-(-num_rows // BLOCK_QUERIES), 1, 1)
            plan = LaunchPlan("triton", "causal_attention", grid, 32 * NUM_WARPS, shared_bytes, arguments)
            executor.launch([plan], schedule)
            assert (out.double() - expected).norm() / expected.norm() < 3e-3
