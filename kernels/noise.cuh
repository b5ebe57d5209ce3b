// The Gumbel noise of the sampler, a pure function of (key, token id); the Python twin is noise.py. The uniforms are
// bit-identical to it; the two logarithms differ by at most 2 ulp.
#pragma once
#include "device.cuh"

// A 32-bit mixing function of low bias (Wellons, "Prospecting for hash functions", 2018: lowbias32).
DEVICE u32 mix32(u32 x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// The largest value of gumbel_noise is 33 ln 2 = 22.874.
constexpr float MAX_GUMBEL = 22.875f;

// Uniform in [2^-33, 1 - 2^-24]; (hash + 0.5) * 2^-32 rounded once to float, as in Python.
DEVICE float uniform_noise(u32 key0, u32 key1, u32 token) {
  u32 hash = mix32(mix32(token ^ key0) ^ key1);
  float u = __ull2float_rn(2ull * hash + 1ull) * 0x1p-33f;
  return fminf(fmaxf(u, 0x1p-33f), 1.f - 0x1p-24f);
}

DEVICE float gumbel_noise(float u) { return -logf(-log1pf(-u)); }
