// bfloat16 and float16 on the device: 16 bits, to float and back with rounding to nearest even.
#pragma once

#include "cuda/launch.h"
#include "element_types.h"

#ifdef FASTMETA_EMULATE
#define FASTMETA_TARGET scalar
#include "cpu/convert.h"
#undef FASTMETA_TARGET

namespace fastmeta {
using scalar::round_to;
using scalar::widen;
}  // namespace fastmeta

#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastmeta {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T round_to(typename Wide<T>::type x) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return x;
  }
}

}  // namespace fastmeta

#endif
