// Instruction-set selection: the vocabulary kernels are compiled once per instruction set into its own namespace.
#pragma once

#include <vector>

#include "divergence.h"
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

struct DivergenceKernels {
  void (*forward)(const DivergenceForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const DivergenceBackward&, int64_t row_begin, int64_t row_end);
};

namespace baseline { extern const TokenStatsKernels token_stats_kernels; }
namespace baseline { extern const DivergenceKernels divergence_kernels; }
#ifdef R1K_X86
namespace avx2 { extern const TokenStatsKernels token_stats_kernels; }
namespace avx512 { extern const TokenStatsKernels token_stats_kernels; }
namespace avx2 { extern const DivergenceKernels divergence_kernels; }
namespace avx512 { extern const DivergenceKernels divergence_kernels; }
#endif

// What this processor can run, narrowest first.
inline std::vector<const TokenStatsKernels*> supported_token_stats_kernels() {
  std::vector<const TokenStatsKernels*> supported = {&baseline::token_stats_kernels};
#ifdef R1K_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    supported.push_back(&avx2::token_stats_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      supported.push_back(&avx512::token_stats_kernels);
    }
  }
#endif
  return supported;
}

// The set in use: the widest, unless a test asks for another.
inline const TokenStatsKernels*& active_token_stats_kernels() {
  static const TokenStatsKernels* active = supported_token_stats_kernels().back();
  return active;
}

// Those of the same set.
inline const DivergenceKernels* active_divergence_kernels() {
#ifdef R1K_X86
  if (active_token_stats_kernels() == &avx512::token_stats_kernels) return &avx512::divergence_kernels;
  if (active_token_stats_kernels() == &avx2::token_stats_kernels) return &avx2::divergence_kernels;
#endif
  return &baseline::divergence_kernels;
}

}  // namespace r1k
