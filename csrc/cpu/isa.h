// Instruction-set selection: token_stats.cpp is compiled once per instruction set into its own namespace.
#pragma once

#include "token_stats.h"

#ifndef R1K_ISA
#define R1K_ISA baseline
#endif

namespace r1k {

struct TokenStatsKernels {
  const char* name;
  void (*forward)(const TokenStatsForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const TokenStatsBackward&, int64_t row_begin, int64_t row_end);
};

namespace baseline { extern const TokenStatsKernels token_stats_kernels; }
#ifdef R1K_X86
namespace avx2 { extern const TokenStatsKernels token_stats_kernels; }
namespace avx512 { extern const TokenStatsKernels token_stats_kernels; }
#endif

// The widest set this processor has; read once.
inline const TokenStatsKernels& token_stats_kernels() {
#ifdef R1K_X86
  static const TokenStatsKernels& chosen = [&]() -> const TokenStatsKernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return avx512::token_stats_kernels;
    }
    // No processor with AVX2 and FMA lacks F16C, but the check costs nothing.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      return avx2::token_stats_kernels;
    }
    return baseline::token_stats_kernels;
  }();
  return chosen;
#else
  return baseline::token_stats_kernels;
#endif
}

}  // namespace r1k
