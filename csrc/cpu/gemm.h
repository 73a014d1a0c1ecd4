// torch's matrix product, for what the row engine does not multiply itself.
#pragma once

#include "tensors.h"

namespace fastmeta {

// a [n, k] b [k, m] by torch's GEMM.
inline Tensor gemm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// What torch's GEMM gets. Its float16 product is slow on CPUs, and so is its bfloat16 one without the instruction.
inline Tensor gemm_operand(const Tensor& matrix) {
  const ScalarType type = matrix.scalar_type();
  const bool widen = type == ScalarType::Half || (type == ScalarType::BFloat16 && !has_bfloat16_products());
  return widen ? torch::stable::to(matrix, ScalarType::Float) : matrix;
}

// Rows [first, first + n).
inline Tensor rows_of(Tensor matrix, int64_t first, int64_t n) {
  return n == matrix.size(0) ? matrix : torch::stable::narrow(matrix, 0, first, n);
}

}  // namespace fastmeta
