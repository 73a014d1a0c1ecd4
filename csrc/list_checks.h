// Checks of lists of tensors, for the CPU and for CUDA: equal shapes, and memory that is written under one name only.
// The arguments of perturbed and of alignment_direction are checked here, before memory is touched.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "checks.h"
#include "list_tensor.h"

namespace fastmeta {

inline ListTensor list_tensor(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()),
          tensor.sizes().data(),
          tensor.strides().data(),
          tensor.dim(),
          tensor.numel(),
          tensor.scalar_type(),
          static_cast<int32_t>(tensor.element_size()),
          tensor.is_cpu() ? -1 : tensor.get_device_index(),
          tensor.is_contiguous()};
}

// Bytes from the first element to the end of the last.
inline int64_t span_of(const ListTensor& tensor) {
  if (tensor.contiguous || tensor.numel == 0) return tensor.numel * tensor.element_size;
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim; ++d) last += (tensor.sizes[d] - 1) * tensor.strides[d];
  return (last + 1) * tensor.element_size;
}
inline int64_t span_of(const Tensor& tensor) { return span_of(list_tensor(tensor)); }

// Whether no two elements share a place, for certain: each stride steps over everything within it.
inline bool has_own_memory(const ListTensor& tensor) {
  if (tensor.contiguous) return true;
  const int64_t *sizes = tensor.sizes, *strides = tensor.strides;
  int64_t inner = 0, counted = 0;  // the last place of the dimensions taken so far, innermost first
  for (int64_t d = 0; d < tensor.dim; ++d) counted += sizes[d] <= 1;
  for (int64_t least = 0; counted < tensor.dim;) {
    int64_t next = -1;
    for (int64_t d = 0; d < tensor.dim; ++d) {
      if (sizes[d] > 1 && strides[d] > least && (next < 0 || strides[d] < strides[next])) next = d;
    }
    if (next < 0 || strides[next] <= inner) return false;
    inner += (sizes[next] - 1) * strides[next];
    least = strides[next];
    ++counted;
  }
  return true;
}
inline bool has_own_memory(const Tensor& tensor) { return has_own_memory(list_tensor(tensor)); }

inline std::string item(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

inline std::string shape_of(const ListTensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim; ++i) text += (i ? ", " : "") + std::to_string(tensor.sizes[i]);
  return text + "]";
}

// Shape of `first`; the list's name and the index are put together only for an error.
inline void check_same_shape(const ListTensor& tensor, const char* list, size_t index, const ListTensor& first,
                             const char* first_list) {
  STD_TORCH_CHECK(tensor.dim == first.dim && std::equal(tensor.sizes, tensor.sizes + tensor.dim, first.sizes),
                  item(list, index), " must be the shape of ", item(first_list, index), " = ", shape_of(first),
                  ", got ", shape_of(tensor));
}
inline void check_same_shape(const Tensor& tensor, const char* list, size_t index, const Tensor& first,
                             const char* first_list) {
  check_same_shape(list_tensor(tensor), list, index, list_tensor(first), first_list);
}

inline void check_supported(const ListTensor& tensor, const char* list, size_t index) {
  STD_TORCH_CHECK(is_supported(tensor.type), item(list, index), " must be float32, bfloat16, float16 or float64, got ",
                  torch::headeronly::toString(tensor.type));
}

inline void check_same_device(const ListTensor& tensor, const char* list, size_t index, const ListTensor& first,
                              const char* first_list) {
  STD_TORCH_CHECK(tensor.device == first.device, item(list, index), " must be on the device of ", first_list);
}

// Device and dtype of `first`.
inline void check_same_kind(const ListTensor& tensor, const char* list, size_t index, const ListTensor& first,
                            const char* first_list) {
  check_same_device(tensor, list, index, first, first_list);
  STD_TORCH_CHECK(tensor.type == first.type, item(list, index), " must be ", torch::headeronly::toString(first.type),
                  " like ", first_list, ", got ", torch::headeronly::toString(tensor.type));
}

// K lists as [count, K], place by place.
template <int K>
std::vector<ListTensor> list_tensors(const std::vector<Tensor>* const (&lists)[K], const char* const (&names)[K]) {
  std::vector<ListTensor> tensors;
  tensors.reserve(K * lists[0]->size());
  for (int k = 1; k < K; ++k) {
    STD_TORCH_CHECK(lists[k]->size() == lists[0]->size(), names[k], " must have ", lists[0]->size(), " tensors like ",
                    names[0], ", got ", lists[k]->size());
  }
  for (size_t i = 0; i < lists[0]->size(); ++i) {
    for (int k = 0; k < K; ++k) tensors.push_back(list_tensor((*lists[k])[i]));
  }
  return tensors;
}

// Memory that is written appears under no other name: n log n comparisons for n tensors.
class Overlap {
 public:
  void reserve(size_t written, size_t read) {
    written_.reserve(written);
    read_.reserve(read);
  }

  void add(const ListTensor& tensor, const char* list, size_t index, bool written) {
    STD_TORCH_CHECK(!written || has_own_memory(tensor), item(list, index),
                    " must have memory of its own for each element");
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data);
    if (tensor.numel > 0) (written ? written_ : read_).push_back({begin, begin + span_of(tensor), list, index});
  }

  void check() {
    const auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
    // Lists that are views of one buffer, or were allocated one after another, are sorted already.
    if (!std::is_sorted(written_.begin(), written_.end(), before)) std::sort(written_.begin(), written_.end(), before);
    for (size_t i = 1; i < written_.size(); ++i) refuse_shared(written_[i - 1], written_[i]);
    for (const Span& span :
         read_) {  // those written lie apart, so only the last that begins before the end can meet it
      const auto next = std::lower_bound(written_.begin(), written_.end(), span.end,
                                         [](const Span& a, uintptr_t end) { return a.begin < end; });
      if (next != written_.begin()) refuse_shared(*(next - 1), span);
    }
  }

 private:
  struct Span {
    uintptr_t begin, end;
    const char* list;
    size_t index;
  };

  static void refuse_shared(const Span& a, const Span& b) {
    STD_TORCH_CHECK(a.end <= b.begin || b.end <= a.begin, item(b.list, b.index), " and ", item(a.list, a.index),
                    " must not share memory");
  }

  std::vector<Span> written_, read_;
};

// [count, 2]: each parameter with its direction.
inline void check_perturb(const ListTensor* tensors, size_t count, const ListTensor& epsilon) {
  STD_TORCH_CHECK(epsilon.numel == 1 && (epsilon.type == ScalarType::Float || epsilon.type == ScalarType::Double),
                  "epsilon must be one float32 or float64");
  Overlap overlap;
  overlap.reserve(count, count);
  for (size_t i = 0; i < count; ++i) {
    const ListTensor &theta = tensors[2 * i], &v = tensors[2 * i + 1];
    check_supported(theta, "params", i);
    check_same_kind(v, "direction", i, theta, "params");
    check_same_shape(v, "direction", i, theta, "params");
    check_same_device(theta, "params", i, epsilon, "epsilon");
    overlap.add(theta, "params", i, true);
    overlap.add(v, "direction", i, false);
  }
  overlap.check();
}

// Of `count` parameters, `step` apart.
inline void check_backup(const ListTensor& backup, const ListTensor* params, size_t count, size_t step) {
  int64_t bytes = backup_align;
  for (size_t i = 0; i < count; ++i) {
    check_same_device(params[i * step], "params", i, backup, "backup");
    bytes += bytes_of_copy(params[i * step]);
  }
  STD_TORCH_CHECK(backup.type == ScalarType::Byte && backup.contiguous && backup.numel >= bytes,
                  "backup must be contiguous uint8 of at least ", bytes, " bytes, got ", backup.numel);
}

inline void check_radius(double radius) {
  check_finite(radius, "radius");
  STD_TORCH_CHECK(radius >= 0, "radius must be >= 0, got ", radius);
}

inline void check_rate(double value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= 1, name, " must be in [0, 1], got ", value);
}

constexpr const char* alignment_names[] = {"grads_labeled", "grads_unlabeled", "ema_labeled", "ema_fourth", "out"};

// [count, 5], as named above.
inline void check_alignment(const ListTensor* tensors, size_t count, const AlignmentNumbers& numbers) {
  check_rate(numbers.decay, "decay");
  check_rate(numbers.decay_norm, "decay_norm");
  STD_TORCH_CHECK(std::isfinite(numbers.epsilon) && numbers.epsilon >= 0, "epsilon must be >= 0 and finite, got ",
                  numbers.epsilon);
  const auto& names = alignment_names;
  Overlap overlap;
  overlap.reserve(3 * count, 2 * count);
  for (size_t i = 0; i < count; ++i) {
    const ListTensor* place = tensors + 5 * i;
    const ListTensor &first = place[0], &average = place[2];
    check_supported(first, names[0], i);
    check_same_device(first, names[0], i, tensors[0], "grads_labeled[0]");
    for (int k = 0; k < 5; ++k) {
      if (k > 0) check_same_shape(place[k], names[k], i, first, names[0]);
      overlap.add(place[k], names[k], i, k >= 2);
    }
    check_same_kind(place[1], names[1], i, first, names[0]);
    check_same_kind(place[4], names[4], i, first, names[0]);
    check_same_kind(place[3], names[3], i, average, names[2]);
    check_same_device(average, names[2], i, first, names[0]);
    if (first.type == ScalarType::Double || average.type != ScalarType::Float) {
      check_same_kind(average, names[2], i, first, names[0]);
    }
  }
  overlap.check();
}

}  // namespace fastmeta
