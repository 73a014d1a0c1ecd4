// A last-layer operator as torch calls it: tensors in, new tensors out, with any strides and of any size.
#pragma once

#include <array>
#include <optional>

#include "last_layer.h"

namespace fastmeta {

using OptionalTensor = std::optional<Tensor>;

// The one or two results; the second is an empty vector where a direction without bias leaves none.
std::array<OptionalTensor, 2> call_last_layer(LastLayerOperands<OptionalTensor> operands, LastLayerCall call);

// The tensor itself if the elements of a row lie side by side, else a contiguous copy.
inline OptionalTensor dense_rows(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return tensor;
  const int64_t last = tensor->dim() - 1;
  return tensor->size(last) <= 1 || tensor->stride(last) == 1 ? tensor : torch::stable::contiguous(*tensor);
}

}  // namespace fastmeta
