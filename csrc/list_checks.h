// Checks of lists of tensors, for the CPU and for CUDA: equal shapes, and memory that is written under one name only.
// The arguments of perturbed and of alignment_direction are checked here, before memory is touched.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"

namespace fastmeta {

// Bytes from the first element to the end of the last.
inline int64_t span_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  if (tensor.is_contiguous()) return tensor.numel() * static_cast<int64_t>(tensor.element_size());
  int64_t last = 0;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (sizes[d] - 1) * strides[d];
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

// Whether no two elements share a place, for certain: each stride steps over everything within it.
inline bool has_own_memory(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t inner = 0, counted = 0;  // the last place of the dimensions taken so far, innermost first
  for (int64_t d = 0; d < tensor.dim(); ++d) counted += sizes[d] <= 1;
  for (int64_t least = 0; counted < tensor.dim();) {
    int64_t next = -1;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (sizes[d] > 1 && strides[d] > least && (next < 0 || strides[d] < strides[next])) next = d;
    }
    if (next < 0 || strides[next] <= inner) return false;
    inner += (sizes[next] - 1) * strides[next];
    least = strides[next];
    ++counted;
  }
  return true;
}

inline std::string item(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

// Shape of `first`; the list's name and the index are put together only for an error.
inline void check_same_shape(const Tensor& tensor, const char* list, size_t index, const Tensor& first,
                             const char* first_list) {
  bool same = tensor.dim() == first.dim();
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == first.size(d);
  STD_TORCH_CHECK(same, item(list, index), " must be the shape of ", item(first_list, index), " = ", shape_of(first),
                  ", got ", shape_of(tensor));
}

inline void check_same_length(const std::vector<Tensor>& list, const char* name, const std::vector<Tensor>& first,
                              const char* first_name) {
  STD_TORCH_CHECK(list.size() == first.size(), name, " must have ", first.size(), " tensors like ", first_name,
                  ", got ", list.size());
}

// Memory that is written appears under no other name.
class Overlap {
 public:
  void add(const Tensor& tensor, const char* list, size_t index, bool written) {
    STD_TORCH_CHECK(!written || tensor.is_contiguous() || has_own_memory(tensor), item(list, index),
                    " must have memory of its own for each element");
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    if (const int64_t bytes = span_of(tensor)) spans_.push_back({begin, begin + bytes, list, index, written});
  }

  void check() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span *read = nullptr, *written = nullptr;  // those that reach furthest
    for (const Span& span : spans_) {
      const Span* other = written && written->end > span.begin ? written : nullptr;
      if (span.written && !other && read && read->end > span.begin) other = read;
      STD_TORCH_CHECK(!other, item(span.list, span.index), " and ", item(other->list, other->index),
                      " must not share memory");
      const Span*& furthest = span.written ? written : read;
      if (!furthest || span.end > furthest->end) furthest = &span;
    }
  }

 private:
  struct Span {
    uintptr_t begin, end;
    const char* list;
    size_t index;
    bool written;
  };
  std::vector<Span> spans_;
};

// Each parameter with its direction.
inline void check_perturb(const std::vector<Tensor>& params, const std::vector<Tensor>& direction,
                          const Tensor& epsilon, double sign) {
  check_same_length(direction, "direction", params, "params");
  check_finite(sign, "sign");
  STD_TORCH_CHECK(epsilon.numel() == 1 &&
                      (epsilon.scalar_type() == ScalarType::Float || epsilon.scalar_type() == ScalarType::Double),
                  "epsilon must be one float32 or float64");
  Overlap overlap;
  for (size_t i = 0; i < params.size(); ++i) {
    check_floating(params[i], "params");
    check_like(direction[i], "direction", params[i], "params");
    check_same_shape(direction[i], "direction", i, params[i], "params");
    STD_TORCH_CHECK(params[i].device() == epsilon.device(), item("params", i), " must be on the device of epsilon");
    overlap.add(params[i], "params", i, true);
    overlap.add(direction[i], "direction", i, false);
  }
  overlap.check();
}

// The backup: backup_align bytes of which the first tell whether it holds parameters, then each tensor's elements,
// aligned. With the mark, restoring after an interrupt is right whether or not the parameters had been moved by then.
constexpr int64_t backup_align = 64;

inline int64_t bytes_of_copy(const Tensor& tensor) {
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  return (bytes + backup_align - 1) / backup_align * backup_align;
}

inline char* check_backup(const Tensor& backup, const std::vector<Tensor>& params) {
  int64_t bytes = backup_align;
  for (const Tensor& theta : params) {
    STD_TORCH_CHECK(theta.device() == backup.device(), "backup must be on the device of params");
    bytes += bytes_of_copy(theta);
  }
  STD_TORCH_CHECK(backup.scalar_type() == ScalarType::Byte && backup.is_contiguous() && backup.numel() >= bytes,
                  "backup must be contiguous uint8 of at least ", bytes, " bytes, got ", backup.numel());
  return static_cast<char*>(backup.data_ptr());
}

inline void check_rate(double value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= 1, name, " must be in [0, 1], got ", value);
}

// grads_labeled, grads_unlabeled, ema_labeled, ema_fourth and out.
inline void check_alignment(const std::vector<Tensor>* const (&lists)[5], double decay, double decay_norm,
                            double epsilon) {
  check_rate(decay, "decay");
  check_rate(decay_norm, "decay_norm");
  STD_TORCH_CHECK(std::isfinite(epsilon) && epsilon >= 0, "epsilon must be >= 0 and finite, got ", epsilon);
  const char* const names[] = {"grads_labeled", "grads_unlabeled", "ema_labeled", "ema_fourth", "out"};
  for (int k = 1; k < 5; ++k) check_same_length(*lists[k], names[k], *lists[0], names[0]);
  Overlap overlap;
  for (size_t i = 0; i < lists[0]->size(); ++i) {
    const Tensor &first = (*lists[0])[i], &average = (*lists[2])[i];
    check_floating(first, names[0]);
    STD_TORCH_CHECK(first.device() == (*lists[0])[0].device(), item(names[0], i), " must be on the device of ",
                    item(names[0], 0));
    for (int k = 0; k < 5; ++k) {
      const Tensor& tensor = (*lists[k])[i];
      if (k > 0) check_same_shape(tensor, names[k], i, first, names[0]);
      overlap.add(tensor, names[k], i, k >= 2);
    }
    check_like((*lists[1])[i], names[1], first, names[0]);
    check_like((*lists[4])[i], names[4], first, names[0]);
    check_like((*lists[3])[i], names[3], average, names[2]);
    STD_TORCH_CHECK(average.device() == first.device(), names[2], " must be on the device of ", names[0]);
    if (first.scalar_type() == ScalarType::Double || average.scalar_type() != ScalarType::Float) {
      check_like(average, names[2], first, names[0]);
    }
  }
  overlap.check();
}

}  // namespace fastmeta
