// Checks of masked_adam_'s arguments, for the CPU and for CUDA, before memory is touched.
#pragma once

#include <array>
#include <limits>

#include "checks.h"

namespace fastmeta {

// The arguments in the order of the schema.
struct MaskedAdam {
  View table, index, grad, exp_avg, exp_avg_sq, steps;
  double lr, beta1, beta2, eps, low, high;  // bounds that are not given are infinite

  // Throws where an argument does not fit; rows out of range are seen by who reads them.
  MaskedAdam(const DLTensor* const* tensors, const double* numbers);

 private:
  void check_tensors() const;
  void check_memory() const;
  void check_numbers(const double* numbers) const;
};

inline MaskedAdam::MaskedAdam(const DLTensor* const* tensors, const double* numbers)
    : table(tensors[0]),
      index(tensors[1]),
      grad(tensors[2]),
      exp_avg(tensors[3]),
      exp_avg_sq(tensors[4]),
      steps(tensors[5]),
      lr(numbers[0]),
      beta1(numbers[1]),
      beta2(numbers[2]),
      eps(numbers[3]),
      low(std::isnan(numbers[4]) ? -std::numeric_limits<double>::infinity() : numbers[4]),
      high(std::isnan(numbers[5]) ? std::numeric_limits<double>::infinity() : numbers[5]) {
  check_tensors();
  check_numbers(numbers);
  check_memory();
}

inline void check_same_shape(const View& tensor, const char* name, const View& table) {
  check_present(tensor, name);
  bool same = tensor.dim() == table.dim();
  for (int64_t d = 0; same && d < table.dim(); ++d) same = tensor.size(d) == table.size(d);
  STD_TORCH_CHECK(same, name, " must be the shape of table = ", shape_of(table), ", got ", shape_of(tensor));
}

inline void MaskedAdam::check_tensors() const {
  check_floating(table, "table");
  check_present(index, "index");
  check_present(steps, "steps");
  check_present(grad, "grad");
  const int64_t dims = table.dim();
  STD_TORCH_CHECK(dims == 1 || dims == 2, "table must be [M] or [M, C], got ", shape_of(table));
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.is_on_device_of(table),
                  "index must be int64 [n] on the device of table, got ", shape_of(index));
  STD_TORCH_CHECK(index.numel() < int64_t{1} << 30, "index must have less than 2^30 rows, got ", index.numel());
  STD_TORCH_CHECK(steps.scalar_type() == ScalarType::Int && steps.is_on_device_of(table),
                  "steps must be int32 on the device of table");
  check_vector(steps, "steps", "[M]", table.size(0));
  check_same_shape(exp_avg, "exp_avg", table);
  check_same_shape(exp_avg_sq, "exp_avg_sq", table);
  STD_TORCH_CHECK(grad.dim() == dims && grad.size(0) == index.size(0) && (dims == 1 || grad.size(1) == table.size(1)),
                  "grad must have a row of the table for each of index, got ", shape_of(grad));
  check_like(grad, "grad", table, "table");
  STD_TORCH_CHECK(exp_avg.is_on_device_of(table), "exp_avg must be on the device of table");
  if (table.scalar_type() == ScalarType::Double || exp_avg.scalar_type() != ScalarType::Float) {
    check_like(exp_avg, "exp_avg", table, "table");
  }
  check_like(exp_avg_sq, "exp_avg_sq", exp_avg, "exp_avg");
}

inline void MaskedAdam::check_numbers(const double* numbers) const {
  check_finite(lr, "lr");
  STD_TORCH_CHECK(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "betas must be in [0, 1)");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0, "eps must be >= 0 and finite, got ", eps);
  STD_TORCH_CHECK(!std::isinf(numbers[4]), "low must be finite, got ", low);
  STD_TORCH_CHECK(!std::isinf(numbers[5]), "high must be finite, got ", high);
  STD_TORCH_CHECK(low <= high, "low must be <= high, got ", low, " and ", high);
}

// Whether the rows of two tables of one row stride lie beside each other, as state[:, 0] and state[:, 1] do.
inline bool interleaved(const View& a, const View& b) {
  const int64_t period = a.stride(0) * a.element_size();
  if (period == 0 || b.stride(0) * b.element_size() != period) return false;
  const auto width = [](const View& t) {
    return ((t.dim() > 1 ? (t.size(1) - 1) * t.stride(1) : 0) + 1) * t.element_size();
  };
  const int64_t distance = static_cast<char*>(b.data()) - static_cast<char*>(a.data());
  const int64_t offset = (distance % period + period) % period;
  return width(a) <= offset && offset + width(b) <= period;
}

inline void MaskedAdam::check_memory() const {
  const View* const tensors[] = {&table, &exp_avg, &exp_avg_sq, &steps, &grad, &index};
  const char* const names[] = {"table", "exp_avg", "exp_avg_sq", "steps", "grad", "index"};
  const char *begin[6], *end[6];
  for (int i = 0; i < 6; ++i) {
    begin[i] = static_cast<const char*>(tensors[i]->data());
    end[i] = begin[i] + tensors[i]->span();
  }
  for (int a = 0; a < 4; ++a) {  // the four that are written
    STD_TORCH_CHECK(tensors[a]->has_own_memory(), names[a], " must have memory of its own for each element");
    for (int b = a + 1; b < 6; ++b) {
      STD_TORCH_CHECK(end[a] <= begin[b] || end[b] <= begin[a] || interleaved(*tensors[a], *tensors[b]), names[a],
                      " and ", names[b], " must not share memory");
    }
  }
}

// The operator's arguments as they come from torch.
struct MaskedAdamTensors {
  TensorView views[6];
  double numbers[6];

  MaskedAdamTensors(const Tensor& table, const Tensor& index, const Tensor& grad, const Tensor& exp_avg,
                    const Tensor& exp_avg_sq, const Tensor& steps, double lr, double beta1, double beta2, double eps,
                    std::optional<double> low, std::optional<double> high)
      : views{{table, true}, index, grad, {exp_avg, true}, {exp_avg_sq, true}, {steps, true}},
        numbers{lr, beta1, beta2, eps, bound(low, "low"), bound(high, "high")} {}

  MaskedAdam checked() const { return MaskedAdam(pointers().data(), numbers); }
  bool run(NativeFunction function, void* stream) const {
    return function(pointers().data(), numbers, nullptr, stream);
  }

 private:
  std::array<const DLTensor*, 6> pointers() const {
    return {views[0].get(), views[1].get(), views[2].get(), views[3].get(), views[4].get(), views[5].get()};
  }
  static double bound(std::optional<double> given, const char* name) {
    if (given) check_finite(*given, name);  // NaN stands for none
    return given.value_or(std::numeric_limits<double>::quiet_NaN());
  }
};

}  // namespace fastmeta
