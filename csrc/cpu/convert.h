// bfloat16 and float16 as 16 bits, to float and back, without branches: loops over them vectorize on any instruction
// set. Rounding to nearest even; subnormal numbers, infinities and NaN are kept. Vectors are converted in vec.h,
// bfloat16 by the same functions.
//
// Included once for each instruction set, in that set's namespace (targets.h).
#include <cstdint>

#include "cpu/isa.h"
#include "element_types.h"

namespace fastmeta::FASTMETA_TARGET {

// The bits of bfloat16 numbers in the lower halves: of one float, or of a vector of floats.
template <class Bits, class Floats>
FASTMETA_INLINE Bits bfloat16_bits(Floats x) {
  const Bits bits = __builtin_bit_cast(Bits, x);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return x != x ? bits >> 16 | 0x40u : rounded;
}

// The floats whose upper halves are bfloat16 numbers.
template <class Floats, class Bits>
FASTMETA_INLINE Floats floats_of_bfloat16(Bits bits) {
  return __builtin_bit_cast(Floats, bits << 16);
}

FASTMETA_INLINE float widen(float x) { return x; }
FASTMETA_INLINE double widen(double x) { return x; }
FASTMETA_INLINE float widen(Bfloat16 x) { return floats_of_bfloat16<float>(uint32_t{x.bits}); }
FASTMETA_INLINE float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits & 0x7c00u, fraction = x.bits & 0x03ffu;
  const uint32_t normal = ((x.bits & 0x7fffu) << 13) + (112u << 23);  // the bias 15 becomes 127
  const uint32_t special = 0x7f800000u | fraction << 13;
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int32_t>(fraction)) * 0x1p-24f);
  const uint32_t magnitude = exponent == 0 ? subnormal : (exponent == 0x7c00u ? special : normal);
  return __builtin_bit_cast(float, sign | magnitude);
}

template <class T>
FASTMETA_INLINE T round_to(typename Wide<T>::type x);
template <>
FASTMETA_INLINE float round_to<float>(float x) {
  return x;
}
template <>
FASTMETA_INLINE double round_to<double>(double x) {
  return x;
}
template <>
FASTMETA_INLINE Bfloat16 round_to<Bfloat16>(float x) {
  return {static_cast<uint16_t>(bfloat16_bits<uint32_t>(x))};
}
template <>
FASTMETA_INLINE Float16 round_to<Float16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Adding 0.5, whose last place is 2^-24, rounds to a multiple of the smallest subnormal.
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : 0x7c00u;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude >= 0x477ff000u ? special : finite))};  // 65520
}

}  // namespace fastmeta::FASTMETA_TARGET
