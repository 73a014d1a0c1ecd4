// From tensors to the matrices the kernels read, torch's thread pool, and torch's GEMM for what the row engine does not
// multiply itself.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "../view.h"
#include "isa.h"
#include "row_program.h"

namespace fastmeta {

template <class A>
constexpr ScalarType accumulation_type = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      return Element::float64;
  }
}

// A matrix [rows, columns] with dense rows, or a vector as [rows, 1]; null if it is absent.
inline Matrix matrix_of(const View& tensor) {
  if (!tensor.has_value()) return {};
  return {tensor.data(), tensor.stride(0), element_of(tensor.scalar_type())};
}

// How many threads to use for work of this many vector operations: one until a second saves more than waking it costs.
inline int64_t parallel_chunks(int64_t items, double operations) {
  constexpr double least = 12288;
  if (operations < 2 * least) return 1;
  const double most = std::min<double>(torch::stable::get_num_threads(), static_cast<double>(items));
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(most, operations / least)));
}

// Calls f(begin, end, chunk) for [0, items) cut into `chunks` parts, at multiples of 16.
template <class F>
void for_chunks(int64_t items, int64_t chunks, const F& f) {
  if (chunks == 1) {
    f(int64_t{0}, items, int64_t{0});
    return;
  }
  const int64_t size = ((items + chunks - 1) / chunks + 15) / 16 * 16;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      f(std::min(items, chunk * size), std::min(items, (chunk + 1) * size), chunk);
    }
  });
}

// Calls f with a zero of the accumulation type.
template <class F>
auto with_accumulation(ScalarType type, const F& f) {
  return type == ScalarType::Double ? f(0.0) : f(0.0F);
}

// Runs a combination of matrices, its rows in parallel.
template <class A>
void run_combination(const Combination<A>& combination) {
  const RowKernels<A>& kernels = row_kernels<A>();
  const double operations =
      2.0 * static_cast<double>(combination.chunks * combination.rows * combination.columns / kernels.lanes);
  for_chunks(combination.rows, parallel_chunks(combination.rows, operations),
             [&](int64_t begin, int64_t end, int64_t) { kernels.combine(combination, begin, end); });
}

// a [n, k] b [k, m] by torch's GEMM.
inline Tensor gemm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// The operand for torch's GEMM: float32 in place of float16, whose product is slow on CPUs, and of bfloat16 where there
// are no bfloat16 instructions.
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
