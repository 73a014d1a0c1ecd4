// A call of a last-layer operator on the CPU: one pass over the rows that multiplies as it goes, or torch's GEMM before
// or after it.
#pragma once

#include <array>
#include <optional>

#include "../last_layer_call.h"
#include "tensors.h"

namespace fastmeta {

// Which products the row engine does itself, and which are torch's GEMM. Crossovers measured on Zen 5: with AVX-512 the
// engine multiplies twice as fast as torch's GEMM, with AVX2 as fast, with 128-bit vectors less than half as fast, so
// that only the saved calls speak for it. Its sum of outer products needs each thread's [C, D] in the second-level
// cache; a larger factor needs rows enough to pay for packing it. bfloat16 instructions multiply three times as fast.
struct OwnProducts {
  bool forward, gradient;

  OwnProducts(const LastLayerSizes& sizes, ScalarType type);
  explicit OwnProducts(const LastLayerCall& call) : OwnProducts(call.sizes, call.operands.features.scalar_type()) {}
  bool all(LastLayerResult result) const { return result == LastLayerResult::gradient ? gradient : forward; }
};

// The whole call; out[j] is the operator's j-th result (native.h).
// False: a product is torch's GEMM's, or the rows of an operand are not dense; nothing has been written.
bool run_last_layer(const LastLayerCall& call, DLTensor* const* out);

using OptionalTensor = std::optional<Tensor>;

// The whole call as torch makes it: tensors in, new tensors out, with any strides and of any size. Of the one or two
// results the second is an empty vector where a direction without bias leaves none.
std::array<OptionalTensor, 2> call_last_layer(LastLayerOperands<OptionalTensor> operands, LastLayerCall call);

// The tensor itself if the elements of a row lie side by side, else a contiguous copy.
inline OptionalTensor dense_rows(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return tensor;
  const int64_t last = tensor->dim() - 1;
  return tensor->size(last) <= 1 || tensor->stride(last) == 1 ? tensor : torch::stable::contiguous(*tensor);
}

}  // namespace fastmeta
