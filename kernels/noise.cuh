// The Gumbel noise of the sampler, a pure function of (key, token id); the Python twin is noise.py. The uniforms are
// bit-identical to it, and so is the noise but for the last bit of a double-precision logarithm.
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

// Hash to uniform in [2^-33, 1 - 2^-24], with the roundings of noise.py.
DEVICE float uniform_noise(u32 key0, u32 key1, u32 token) {
  u32 hash = mix32(mix32(token ^ key0) ^ key1);
  return fminf((__uint2float_rn(hash) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
}

// In double precision and rounded once; slow, so first see with the estimate whether a token can win at all.
DEVICE float gumbel_noise(float uniform) { return (float)-log(-log1p(-(double)uniform)); }
DEVICE float gumbel_estimate(float uniform) { return -logf(-log1pf(-uniform)); }
