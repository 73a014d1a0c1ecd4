// The element types of tensors, on the CPU and on CUDA, and calls that have one of them as a constant.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

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

// Calls f with a zero of the type.
template <class F>
void with_element(torch::headeronly::ScalarType type, const F& f) {
  switch (type) {
    case torch::headeronly::ScalarType::Float:
      return f(float{});
    case torch::headeronly::ScalarType::Double:
      return f(double{});
    case torch::headeronly::ScalarType::BFloat16:
      return f(Bfloat16{});
    default:
      return f(Float16{});
  }
}

// Calls f with a zero of the type and one of the type of its averages: the same, or float32 where they are `wide`.
template <class F>
void with_averages(torch::headeronly::ScalarType type, bool wide, const F& f) {
  with_element(type, [&](auto zero) {
    if constexpr (sizeof(zero) == 2) {
      if (wide) return f(zero, float{});
    }
    f(zero, zero);
  });
}

}  // namespace fastmeta
