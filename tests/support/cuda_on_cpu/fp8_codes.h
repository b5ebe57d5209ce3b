// e4m3 numbers by definition: a sign, a multiple of 2^-9 that four bits hold, or of more up to 448; all ones are NaN.
#pragma once
#include <bits/stl_algobase.h>

#include <cmath>
#include <limits>

static inline float float_of_code(unsigned code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float magnitude = std::ldexp((float)(exponent ? 8 + mantissa : mantissa), std::max(exponent, 1) - 10);
  if ((code & 127) == 127) magnitude = std::numeric_limits<float>::quiet_NaN();
  return code & 128 ? -magnitude : magnitude;
}
// The nearest, ties to even; 448 for all beyond it.
static inline unsigned code_of_float(float x) {
  if (x != x) return 127;
  const double magnitude = std::min(std::fabs((double)x), 448.0);
  const int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), -6) : -6;
  const unsigned eighths = (unsigned)std::nearbyint(std::ldexp(magnitude, 3 - exponent));  // 16 carries upwards
  return (std::signbit(x) ? 128 : 0) | (((unsigned)(exponent + 6) << 3) + eighths);
}
