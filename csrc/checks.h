// Checks of arguments: one error that names the argument, what was expected and what came, before memory is touched.
// fastmeta/checks.py makes the same checks for the reference path.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

namespace fastmeta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Double,
                  name, " must be float32, bfloat16, float16 or float64");
}

inline void check_matrix(const Tensor& tensor, const char* name, const char* symbols) {
  check_floating(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be 2-D ", symbols, ", got ", tensor.dim(), "-D ", shape_of(tensor));
}

// Same dtype and device as the first argument.
inline void check_like(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) {
  STD_TORCH_CHECK(tensor.device() == first.device(), name, " must be on the device of ", first_name);
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), name, " must have the dtype of ", first_name);
}

inline void check_vector(const Tensor& tensor, const char* name, const char* symbols, int64_t size) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must be ", symbols, " = [", size, "], got ",
                  shape_of(tensor));
}

inline void check_shape(const Tensor& tensor, const char* name, const char* symbols, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must be ", symbols,
                  " = [", rows, ", ", columns, "], got ", shape_of(tensor));
}

inline void check_finite(double value, const char* name) {
  STD_TORCH_CHECK(std::isfinite(value), name, " must be finite, got ", value);
}

}  // namespace fastmeta
