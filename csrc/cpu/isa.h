// The instruction set chosen at run time: a build on one machine runs on an older one.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#define FASTMETA_X86 1
#else
#define FASTMETA_X86 0
#endif
#define FASTMETA_INLINE inline __attribute__((always_inline))

namespace fastmeta {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best set this processor has; FASTMETA_ISA=baseline|avx2|avx512 lowers it (for tests and measurements).
inline Isa detect_isa() {
  Isa isa = Isa::baseline;
#if FASTMETA_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isa = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      isa = Isa::avx512;
    }
  }
  if (const char* wanted = std::getenv("FASTMETA_ISA")) {
    if (std::strcmp(wanted, "baseline") == 0) isa = Isa::baseline;
    if (std::strcmp(wanted, "avx2") == 0 && isa == Isa::avx512) isa = Isa::avx2;
  }
#endif
  return isa;
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

// Whether torch's GEMM has bfloat16 instructions to use; a lowered set stands for a processor without them.
inline bool has_bfloat16_products() {
#if FASTMETA_X86
  static const bool has = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return true;
#endif
}

inline const char* isa_in_use() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

inline std::vector<const char*> isa_built() {
#if FASTMETA_X86
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

}  // namespace fastmeta
