// Compiles the kernels of a file once for each instruction set, each time in a namespace of its own and with the
// compiler's target switched on, as Highway's foreach_target.h does. The best set is picked at run time (isa.h). Such a
// file includes itself:
//
//   #ifndef FASTMETA_TARGET
//   // headers, and the types that kernels read
//   #define FASTMETA_KERNELS "cpu/this_file.cpp"
//   #include "cpu/targets.h"
//   // functions that call FASTMETA_BEST(kernel)(arguments)
//   #else
//   namespace fastmeta::FASTMETA_TARGET {  // kernels
//   }
//   #endif
//
// Ordinary headers come before, so that nothing that they define is compiled for any other set than the baseline.
#include "cpu/isa.h"

#if FASTMETA_X86
#include <immintrin.h>
#endif

#define FASTMETA_TARGET baseline
#define FASTMETA_VECTOR_BYTES 16
#include FASTMETA_KERNELS
#undef FASTMETA_TARGET
#undef FASTMETA_VECTOR_BYTES

#if FASTMETA_X86

#define FASTMETA_TARGET avx2
#define FASTMETA_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include FASTMETA_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTMETA_TARGET
#undef FASTMETA_VECTOR_BYTES

#define FASTMETA_TARGET avx512
#define FASTMETA_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include FASTMETA_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTMETA_TARGET
#undef FASTMETA_VECTOR_BYTES

// The kernel of this processor's best set. Variadic: a name may have several template arguments.
#define FASTMETA_BEST(...) \
  fastmeta::best(&fastmeta::baseline::__VA_ARGS__, &fastmeta::avx2::__VA_ARGS__, &fastmeta::avx512::__VA_ARGS__)

namespace fastmeta {

template <class Function>
Function* best(Function* baseline, Function* avx2, Function* avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : baseline;
}

}  // namespace fastmeta

#else
#define FASTMETA_BEST(...) (&fastmeta::baseline::__VA_ARGS__)
#endif
