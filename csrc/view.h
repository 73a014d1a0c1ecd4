// A tensor as its memory and shape: what checks and kernels read of an argument, whether the fast entry brings it or
// torch does. It costs nothing to make and owns nothing.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "native.h"

namespace fastmeta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType scalar_type_of(const DLDataType& type) {
  if (type.lanes != 1) return ScalarType::Undefined;
  switch (type.code << 8 | type.bits) {
    case kDLFloat << 8 | 16:
      return ScalarType::Half;
    case kDLFloat << 8 | 32:
      return ScalarType::Float;
    case kDLFloat << 8 | 64:
      return ScalarType::Double;
    case kDLBfloat << 8 | 16:
      return ScalarType::BFloat16;
    case kDLInt << 8 | 32:
      return ScalarType::Int;
    case kDLInt << 8 | 64:
      return ScalarType::Long;
    default:
      return ScalarType::Undefined;  // none that a kernel takes
  }
}

// The questions of torch::stable::Tensor, answered from a DLTensor, which must outlive it; nothing where the argument
// is absent.
class View {
 public:
  View() = default;
  View(const DLTensor* tensor)
      : tensor_(tensor), type_(tensor == nullptr ? ScalarType::Undefined : scalar_type_of(tensor->dtype)) {}

  bool has_value() const { return tensor_ != nullptr; }
  int64_t dim() const { return tensor_->ndim; }
  int64_t size(int64_t d) const { return tensor_->shape[d]; }
  int64_t stride(int64_t d) const { return tensor_->strides[d]; }
  ScalarType scalar_type() const { return type_; }
  int64_t element_size() const { return tensor_->dtype.bits / 8; }
  bool is_on_device_of(const View& other) const {
    return tensor_->device.device_type == other.tensor_->device.device_type &&
           tensor_->device.device_id == other.tensor_->device.device_id;
  }
  int device_index() const { return tensor_->device.device_id; }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dim(); ++d) product *= size(d);
    return product;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) {
      if (size(d) == 0) return true;
      if (size(d) != 1 && stride(d) != expected) return false;
      expected *= size(d);
    }
    return true;
  }

  // Whether the elements of a row lie side by side.
  bool has_dense_rows() const { return size(dim() - 1) <= 1 || stride(dim() - 1) == 1; }

  // Bytes from the first element to the end of the last.
  int64_t span() const {
    int64_t last = 0;
    for (int64_t d = 0; d < dim(); ++d) {
      if (size(d) == 0) return 0;
      last += (size(d) - 1) * stride(d);
    }
    return (last + 1) * element_size();
  }

  // Whether no two elements share a place, for certain: each stride steps over everything within it.
  bool has_own_memory() const {
    if (is_contiguous()) return true;
    int64_t inner = 0, counted = 0;  // the last place of the dimensions taken so far, innermost first
    for (int64_t d = 0; d < dim(); ++d) counted += size(d) <= 1;
    for (int64_t least = 0; counted < dim(); ++counted) {
      int64_t next = -1;
      for (int64_t d = 0; d < dim(); ++d) {
        if (size(d) > 1 && stride(d) > least && (next < 0 || stride(d) < stride(next))) next = d;
      }
      if (next < 0 || stride(next) <= inner) return false;
      inner += (size(next) - 1) * stride(next);
      least = stride(next);
    }
    return true;
  }

  void* data() const {
    void* data = static_cast<char*>(tensor_->data) + tensor_->byte_offset;
    STD_TORCH_CHECK(tensor_->data != nullptr || numel() == 0, "a tensor without memory cannot be read");
    return data;
  }

 private:
  const DLTensor* tensor_ = nullptr;
  ScalarType type_ = ScalarType::Undefined;
};

// A tensor of torch, or nothing, as a DLTensor. The tensor must outlive it.
class TensorView {
 public:
  TensorView() = default;
  // Memory that is written to must be the tensor's own: torch copies lazily.
  TensorView(const Tensor& tensor, bool written = false) : present_(true) {
    const auto type = tensor.scalar_type();
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const auto device = tensor.device();
    tensor_ = {.data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()),
               .device = {.device_type = device_type_of(device.type()), .device_id = index_of(device)},
               .ndim = static_cast<int32_t>(tensor.dim()),
               .dtype = data_type_of(type, static_cast<int>(tensor.element_size())),
               .shape = const_cast<int64_t*>(sizes.data()),
               .strides = const_cast<int64_t*>(strides.data()),
               .byte_offset = 0};
  }
  TensorView(const std::optional<Tensor>& tensor) {
    if (tensor.has_value()) *this = TensorView(*tensor);
  }

  const DLTensor* get() const { return present_ ? &tensor_ : nullptr; }
  DLTensor* get() { return present_ ? &tensor_ : nullptr; }
  operator View() const { return get(); }

 private:
  static DLDeviceType device_type_of(torch::headeronly::DeviceType type) {
    if (type == torch::headeronly::DeviceType::CPU) return kDLCPU;
    return type == torch::headeronly::DeviceType::CUDA ? kDLCUDA : kDLExtDev;  // no kernel's
  }
  static int32_t index_of(const torch::stable::Device& device) {
    return device.type() == torch::headeronly::DeviceType::CPU ? 0 : static_cast<int32_t>(device.index());
  }
  static DLDataType data_type_of(ScalarType type, int size) {
    const auto bits = static_cast<uint8_t>(8 * size);
    switch (type) {
      case ScalarType::Half:
      case ScalarType::Float:
      case ScalarType::Double:
        return {kDLFloat, bits, 1};
      case ScalarType::BFloat16:
        return {kDLBfloat, bits, 1};
      case ScalarType::Int:
      case ScalarType::Long:
        return {kDLInt, bits, 1};
      default:
        return {kDLOpaqueHandle, bits, 1};
    }
  }

  DLTensor tensor_{};
  bool present_ = false;
};

}  // namespace fastmeta
