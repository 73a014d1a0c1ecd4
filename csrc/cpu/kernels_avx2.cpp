// The kernels for AVX2 with FMA and F16C.
#include "kernel_headers.h"

#if FASTMETA_X86
#define FASTMETA_TARGET avx2
#define FASTMETA_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
