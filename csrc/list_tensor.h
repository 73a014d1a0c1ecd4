// What the operators on lists know of a tensor, and those operators as functions of memory. Nothing of torch but its
// dtypes: fastmeta._C_lists, which is built against torch's C++ API, hands these structs to kernels that are not.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>

namespace fastmeta {

// Borrowed: the tensor must outlive it and keep its shape.
struct ListTensor {
  char* data;
  const int64_t *sizes, *strides;  // [dim], strides in elements
  int64_t dim, numel;
  torch::headeronly::ScalarType type;
  int32_t element_size;
  int32_t device;  // -1: the CPU, else the number of the GPU
  bool contiguous;
};

// Parameters at theta + epsilon v, at theta - epsilon v, and back: one object for each block of `perturbed`.
class Perturbation {
 public:
  virtual ~Perturbation() = default;
  virtual void enter(double radius) = 0;  // epsilon, the backup, theta <- theta + epsilon v
  virtual void move(double sign) = 0;     // theta <- saved + sign epsilon v
  virtual void restore() = 0;             // nothing where the backup holds no parameters
  // The parameters that were at these addresses, in ascending order, are no longer touched.
  virtual void leave_out(const char* const* begin, const char* const* end) = 0;
};

struct AlignmentNumbers {
  double decay, decay_norm, epsilon;
};

// Of one device. Tensors are [count, K], place by place. A check throws std::exception.
struct ListFunctions {
  // K = 5: grad_labeled, grad_unlabeled, ema_labeled, ema_fourth, out.
  void (*check_alignment)(const ListTensor* tensors, size_t count, const AlignmentNumbers& numbers);
  void (*align)(const ListTensor* tensors, size_t count, const AlignmentNumbers& numbers);
  // K = 2: parameter, direction. Checks its arguments. The caller owns the result, and keeps all memory in place.
  Perturbation* (*perturb)(const ListTensor* tensors, size_t count, const ListTensor& backup,
                           const ListTensor& epsilon);
};

// Those of the library this is compiled into; each exports them under one name, found there by dlsym.
void check_alignment(const ListTensor* tensors, size_t count, const AlignmentNumbers& numbers);
void align(const ListTensor* tensors, size_t count, const AlignmentNumbers& numbers);
Perturbation* perturb(const ListTensor* tensors, size_t count, const ListTensor& backup, const ListTensor& epsilon);
extern "C" __attribute__((visibility("default"))) const ListFunctions* fastmeta_list_functions();

// The backup: backup_align bytes of which the first tell whether it holds parameters, then each tensor's elements,
// aligned. With the mark, restoring after an interrupt is right whether or not the parameters had been moved by then.
constexpr int64_t backup_align = 64;

inline int64_t bytes_of_copy(const ListTensor& tensor) {
  return (tensor.numel * tensor.element_size + backup_align - 1) / backup_align * backup_align;
}

}  // namespace fastmeta
