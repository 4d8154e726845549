// Instruction-set selection: the kernels of PER_ISA in setup.py are compiled once per instruction set, each time into
// that set's own namespace.
#pragma once

#include <vector>

#ifdef R1K_X86
#include <cpuid.h>
#endif
#if defined(R1K_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "accumulate.h"
#include "divergence.h"
#include "gemm.h"
#include "support.h"
#include "token_stats.h"
#include "top_k.h"

#ifndef R1K_ISA
#define R1K_ISA baseline
#endif

namespace r1k {

struct TokenStatsKernels {
  void (*forward)(const TokenStatsForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const TokenStatsBackward&, int64_t row_begin, int64_t row_end);
};

struct DivergenceKernels {
  void (*forward)(const DivergenceForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const DivergenceBackward&, int64_t row_begin, int64_t row_end);
};

struct AccumulateKernels {
  void (*scaled)(const Scaled&, int64_t begin, int64_t end);     // a range of the entries
  void (*add_rows)(const AddRows&, int64_t begin, int64_t end);  // a range of the columns
};

struct TopKKernels {
  void (*top_k)(const TopK&, int64_t row_begin, int64_t row_end);
};

struct SupportKernels {
  void (*products)(const SupportProducts&, int64_t block, int64_t id_begin, int64_t id_end);
  void (*grad_hidden)(const SupportGradHidden&, int64_t block, int64_t first_range, int64_t end_range, int64_t part,
                      SupportMemory& memory);
  void (*grad_weight)(const SupportGradWeight&, int64_t part, int64_t id_begin, int64_t id_end);
};

#define R1K_DECLARE_KERNELS(isa)                      \
  namespace isa {                                     \
  extern const TokenStatsKernels token_stats_kernels; \
  extern const DivergenceKernels divergence_kernels;  \
  extern const GemmKernels gemm_kernels;              \
  extern const AccumulateKernels accumulate_kernels;  \
  extern const TopKKernels top_k_kernels;             \
  extern const SupportKernels support_kernels;        \
  }
R1K_DECLARE_KERNELS(baseline)
#ifdef R1K_X86
R1K_DECLARE_KERNELS(avx2)
R1K_DECLARE_KERNELS(avx512)
R1K_DECLARE_KERNELS(avx512_bf16)  // with those of gemm, support and token_stats alone
R1K_DECLARE_KERNELS(amx_bf16)     // with gemm_kernels alone
#endif

struct Kernels {
  const char* name;
  const TokenStatsKernels* token_stats;
  const DivergenceKernels* divergence;
  const GemmKernels* gemm;
  const AccumulateKernels* accumulate;
  const TopKKernels* top_k;
  const SupportKernels* support;
};

// Whether there are matrix tiles for bfloat16 (AMX) that this process may use.  Linux wants a process to request them
// once, for all threads: they make the state that it saves for a thread larger.
inline bool may_use_tiles() {
#if defined(R1K_X86) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether products and sums of fp32 are taken to be faster than dot products of bfloat16.  Measured on one processor, a
// Xeon whose virtual machine hides its tiles: 154 against 85 GFLOP/s a thread for these kernels, and torch's products of
// fp32 were faster than those of bfloat16 as well (140 against 82).  The rule extends that to Intel's processors with
// AVX-512 for fp16, as those with tiles have; it has not been measured on others.
inline bool dot_products_are_slow() {
#ifdef R1K_X86
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 23 & 1) != 0;
#else
  return false;
#endif
}

#define R1K_KERNELS(isa) \
  {#isa, &isa::token_stats_kernels, &isa::divergence_kernels, &isa::gemm_kernels, &isa::accumulate_kernels, \
   &isa::top_k_kernels, &isa::support_kernels}

// What this processor can run, the fastest last.
inline std::vector<Kernels> find_supported_kernels() {
  std::vector<Kernels> supported = {R1K_KERNELS(baseline)};
#ifdef R1K_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return supported;
  }
  supported.push_back(R1K_KERNELS(avx2));
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return supported;
  }
  Kernels kernels = R1K_KERNELS(avx512);
  supported.push_back(kernels);
  if (!__builtin_cpu_supports("avx512bf16")) return supported;
  kernels.token_stats = &avx512_bf16::token_stats_kernels;
  kernels.support = &avx512_bf16::support_kernels;
  Kernels with_dot_products = kernels;
  kernels.name = "avx512_bf16_fma";
  with_dot_products.name = "avx512_bf16";
  with_dot_products.gemm = &avx512_bf16::gemm_kernels;
  supported.push_back(dot_products_are_slow() ? with_dot_products : kernels);
  supported.push_back(dot_products_are_slow() ? kernels : with_dot_products);
  if (!may_use_tiles()) return supported;
  kernels.name = "amx_bf16";
  kernels.gemm = &amx_bf16::gemm_kernels;
  supported.push_back(kernels);
#endif
  return supported;
}

inline const std::vector<Kernels>& supported_kernels() {
  static const std::vector<Kernels> supported = find_supported_kernels();
  return supported;
}

// The set in use: the fastest, unless a test asks for another.
inline const Kernels*& active_kernels() {
  static const Kernels* active = &supported_kernels().back();
  return active;
}

}  // namespace r1k
