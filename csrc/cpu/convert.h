// bfloat16 and float16 as 16 bits, to float and back, without branches: loops over them vectorize on any instruction
// set. Rounding to nearest even; subnormal numbers, infinities and NaN are kept.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/multiversion.h"

namespace fastmeta {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What a type is computed in.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

FASTMETA_INLINE float widen(float x) { return x; }
FASTMETA_INLINE double widen(double x) { return x; }
FASTMETA_INLINE float widen(Bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
FASTMETA_INLINE float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits & 0x7c00u, fraction = x.bits & 0x03ffu;
  const uint32_t normal = ((x.bits & 0x7fffu) << 13) + (112u << 23);  // the bias 15 becomes 127
  const uint32_t special = 0x7f800000u | fraction << 13;
  const uint32_t subnormal = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(fraction)) * 0x1p-24f);
  const uint32_t magnitude = exponent == 0 ? subnormal : (exponent == 0x7c00u ? special : normal);
  return std::bit_cast<float>(sign | magnitude);
}

template <class T>
FASTMETA_INLINE T narrow(typename Wide<T>::type x);
template <>
FASTMETA_INLINE float narrow<float>(float x) {
  return x;
}
template <>
FASTMETA_INLINE double narrow<double>(double x) {
  return x;
}
template <>
FASTMETA_INLINE Bfloat16 narrow<Bfloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded)};
}
template <>
FASTMETA_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Adding 0.5, whose last place is 2^-24, rounds to a multiple of the smallest subnormal.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : 0x7c00u;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude >= 0x477ff000u ? special : finite))};  // 65520
}

}  // namespace fastmeta
