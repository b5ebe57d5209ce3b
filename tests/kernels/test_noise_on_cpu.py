"""The kernels' noise against the Python sampler's: the same uniforms bit for bit, logarithms within 2 ulp."""

import numpy as np
import pytest
import torch

from outrider.kernels.compiler import compile_sources, load_sources
from outrider.kernels.launch_plans import LaunchPlan
from outrider.kernels.noise import gumbel_from_hash, hash_ids, noise_key, uniform_from_hash
from support.cuda_on_cpu.executor import source_executor
from support.cuda_on_cpu.ptx.executor import ptx_executor

PROBE = """#include "noise.cuh"
KERNEL(256, 1)
probe(const u32* tokens, u32 key0, u32 key1, float* uniforms, float* noise, float* estimates, float* inner, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uniforms[i] = uniform_noise(key0, key1, tokens[i]);
  noise[i] = gumbel_noise(uniforms[i]);
  estimates[i] = gumbel_estimate(uniforms[i]);
  inner[i] = -log1pf(-uniforms[i]);
}
"""
NUM_TOKENS = 50_000


@pytest.fixture(scope="module", params=["source", "sm_80", "sm_100"])
def noise(request):
    """uniforms, noise, estimates, inner logarithms of random tokens and of those with the largest noise."""
    headers = {name: text for name, text in load_sources("sample_shard").items() if name.endswith(".cuh")}
    sources = {**headers, "probe.cu": PROBE}
    if request.param == "source":
        executor = source_executor({"probe": sources})
    else:
        executor = ptx_executor({"probe": compile_sources("probe", sources, request.param).ptx})
    key = noise_key(11, 5)
    tokens = np.concatenate((np.arange(NUM_TOKENS - 3), [0xFFFFFFFF, 0x80000000, 0x7FFFFFFF])).astype(
        np.uint32
    )
    outputs = [torch.zeros(NUM_TOKENS) for _ in range(4)]
    scalars = (np.int32(np.uint32(key[0]).view(np.int32)), np.int32(np.uint32(key[1]).view(np.int32)))
    arguments = (torch.from_numpy(tokens.view(np.int32)), *scalars, *outputs, np.int32(NUM_TOKENS))
    executor.launch([LaunchPlan("probe", "probe", (-(-NUM_TOKENS // 256), 1, 1), 256, 0, arguments)])
    return hash_ids(key, tokens), *(output.numpy() for output in outputs)


def ulps(x, y):
    """Distance of two arrays of floats of the same signs, in units of the last place."""
    return np.abs(x.view(np.int32).astype(np.int64) - y.view(np.int32).astype(np.int64)).max()


def test_uniforms_are_bit_identical(noise):
    hashes, uniforms, *_ = noise
    assert np.array_equal(uniforms.view(np.int32), uniform_from_hash(hashes).view(np.int32))


def test_noise_is_that_of_the_python_sampler(noise):
    hashes, _, gumbel, *_ = noise
    assert ulps(gumbel, gumbel_from_hash(hashes)) <= 1


def test_the_single_precision_logarithm_is_within_2_ulp(noise):
    _, uniforms, _, _, inner = noise
    assert ulps(inner, (-np.log1p(-uniforms.astype(np.float64))).astype(np.float32)) <= 2


def test_the_estimate_errs_by_far_less_than_the_kernel_allows(noise):
    hashes, _, _, estimates, _ = noise
    assert np.abs(estimates.astype(np.float64) - gumbel_from_hash(hashes)).max() < 1e-5  # allowed: 1e-4
