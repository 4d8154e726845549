// Instruction-set selection: token_stats.cpp and gemm.cpp are compiled once per instruction set, each time into
// that set's own namespace.
#pragma once

#include <vector>

#include "gemm.h"
#include "token_stats.h"

#ifndef R1K_ISA
#define R1K_ISA baseline
#endif

namespace r1k {

struct TokenStatsKernels {
  void (*forward)(const TokenStatsForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const TokenStatsBackward&, int64_t row_begin, int64_t row_end);
};

#define R1K_DECLARE_KERNELS(isa)                      \
  namespace isa {                                     \
  extern const TokenStatsKernels token_stats_kernels; \
  extern const GemmKernels gemm_kernels;              \
  }
R1K_DECLARE_KERNELS(baseline)
#ifdef R1K_X86
R1K_DECLARE_KERNELS(avx2)
R1K_DECLARE_KERNELS(avx512)
R1K_DECLARE_KERNELS(avx512_bf16)  // gemm_kernels alone: nothing else multiplies bfloat16
#endif

struct Kernels {
  const char* name;
  const TokenStatsKernels* token_stats;
  const GemmKernels* gemm;
};

// What this processor can run, narrowest first.
inline std::vector<Kernels> find_supported_kernels() {
  std::vector<Kernels> supported = {{"baseline", &baseline::token_stats_kernels, &baseline::gemm_kernels}};
#ifdef R1K_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    supported.push_back({"avx2", &avx2::token_stats_kernels, &avx2::gemm_kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      supported.push_back({"avx512", &avx512::token_stats_kernels, &avx512::gemm_kernels});
      if (__builtin_cpu_supports("avx512bf16")) {
        supported.push_back({"avx512_bf16", &avx512::token_stats_kernels, &avx512_bf16::gemm_kernels});
      }
    }
  }
#endif
  return supported;
}

inline const std::vector<Kernels>& supported_kernels() {
  static const std::vector<Kernels> supported = find_supported_kernels();
  return supported;
}

// No kernel here uses its tiles; torch's own products do, and are faster then.
inline bool supports_amx_bfloat16() {
#ifdef R1K_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

// The set in use: the widest, unless a test asks for another.
inline const Kernels*& active_kernels() {
  static const Kernels* active = &supported_kernels().back();
  return active;
}

}  // namespace r1k
