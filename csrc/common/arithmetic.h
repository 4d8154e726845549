// Arithmetic of single numbers that compilers and targets must not round differently, or do not share.
#pragma once

#include <cmath>

#include "platform.h"

namespace r1k {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kLowest = -3.4028234663852886e38f;  // the lowest finite float32

R1K_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
R1K_HOST_DEVICE int larger(int a, int b) { return a < b ? b : a; }

// 2^x to two units in the last place; on a GPU one instruction, where results below 2^-126 are 0.
R1K_HOST_DEVICE float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// The larger one, or NaN where one of them is.
R1K_HOST_DEVICE float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// Rounded once each, never contracted into something else.
R1K_HOST_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  volatile float p = a * b;
  return p;
#endif
}
R1K_HOST_DEVICE float sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
R1K_HOST_DEVICE float difference(float a, float b) { return sum(a, -b); }

// a b - p, exactly: what rounding the product p of a and b lost.
R1K_HOST_DEVICE float product_error(float a, float b, float p) { return std::fma(a, b, -p); }

// (a - b) - d, exactly: what rounding the difference d of finite a and b lost (Knuth's two-sum).
R1K_HOST_DEVICE float difference_error(float a, float b, float d) {
  const float bb = difference(d, a);
  return difference(difference(a, difference(d, bb)), sum(b, bb));
}

}  // namespace r1k
