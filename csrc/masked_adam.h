// Checks of masked_adam_'s arguments, for the CPU and for CUDA, before memory is touched.
#pragma once

#include <cmath>
#include <optional>

#include "checks.h"
#include "list_checks.h"

namespace fastmeta {

// Whether the rows of two tables of one row stride lie beside each other, as state[:, 0] and state[:, 1] do.
inline bool interleaved(const Tensor& a, const Tensor& b) {
  const auto size_a = static_cast<int64_t>(a.element_size()), size_b = static_cast<int64_t>(b.element_size());
  const int64_t period = a.stride(0) * size_a;
  if (period == 0 || b.stride(0) * size_b != period) return false;
  const int64_t width_a = ((a.dim() > 1 ? (a.size(1) - 1) * a.stride(1) : 0) + 1) * size_a;
  const int64_t width_b = ((b.dim() > 1 ? (b.size(1) - 1) * b.stride(1) : 0) + 1) * size_b;
  const int64_t distance = static_cast<char*>(b.data_ptr()) - static_cast<char*>(a.data_ptr());
  const int64_t offset = (distance % period + period) % period;
  return width_a <= offset && offset + width_b <= period;
}

inline void check_memory(const Tensor* const (&tensors)[6], const char* const (&names)[6]) {
  const char *begin[6], *end[6];
  for (int i = 0; i < 6; ++i) {
    begin[i] = static_cast<const char*>(tensors[i]->data_ptr());
    end[i] = begin[i] + span_of(*tensors[i]);
  }
  for (int a = 0; a < 4; ++a) {  // the four that are written
    STD_TORCH_CHECK(tensors[a]->is_contiguous() || has_own_memory(*tensors[a]), names[a],
                    " must have memory of its own for each element");
    for (int b = a + 1; b < 6; ++b) {
      STD_TORCH_CHECK(end[a] <= begin[b] || end[b] <= begin[a] || interleaved(*tensors[a], *tensors[b]), names[a],
                      " and ", names[b], " must not share memory");
    }
  }
}

inline void check_masked_adam(const Tensor& table, const Tensor& index, const Tensor& grad, const Tensor& exp_avg,
                              const Tensor& exp_avg_sq, const Tensor& steps) {
  check_floating(table, "table");
  const int64_t dims = table.dim();
  STD_TORCH_CHECK(dims == 1 || dims == 2, "table must be [M] or [M, C], got ", shape_of(table));
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.device() == table.device(),
                  "index must be int64 [n] on the device of table, got ", shape_of(index));
  STD_TORCH_CHECK(index.numel() < int64_t{1} << 30, "index must have less than 2^30 rows, got ", index.numel());
  STD_TORCH_CHECK(steps.scalar_type() == ScalarType::Int && steps.device() == table.device(),
                  "steps must be int32 on the device of table");
  check_vector(steps, "steps", "[M]", table.size(0));
  check_same_shape(exp_avg, "exp_avg", 0, table, "table");
  check_same_shape(exp_avg_sq, "exp_avg_sq", 0, table, "table");
  STD_TORCH_CHECK(grad.dim() == dims && grad.size(0) == index.size(0) && (dims == 1 || grad.size(1) == table.size(1)),
                  "grad must have a row of the table for each of index, got ", shape_of(grad));
  check_like(grad, "grad", table, "table");
  STD_TORCH_CHECK(exp_avg.device() == table.device(), "exp_avg must be on the device of table");
  if (table.scalar_type() == ScalarType::Double || exp_avg.scalar_type() != ScalarType::Float) {
    check_like(exp_avg, "exp_avg", table, "table");
  }
  check_like(exp_avg_sq, "exp_avg_sq", exp_avg, "exp_avg");
  check_memory({&table, &exp_avg, &exp_avg_sq, &steps, &grad, &index},
               {"table", "exp_avg", "exp_avg_sq", "steps", "grad", "index"});
}

inline void check_masked_adam(double lr, double beta1, double beta2, double eps, std::optional<double> low,
                              std::optional<double> high) {
  check_finite(lr, "lr");
  STD_TORCH_CHECK(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "betas must be in [0, 1)");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0, "eps must be >= 0 and finite, got ", eps);
  if (low) check_finite(*low, "low");
  if (high) check_finite(*high, "high");
  STD_TORCH_CHECK(!low || !high || *low <= *high, "low must be <= high, got ", *low, " and ", *high);
}

}  // namespace fastmeta
