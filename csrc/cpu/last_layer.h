// A call of a last-layer operator on the CPU: one pass over the rows that multiplies as it goes, or torch's GEMM before
// or after it.
#pragma once

#include <array>
#include <optional>

#include "../last_layer_call.h"
#include "tensors.h"

namespace fastmeta {

// Which products the row engine does itself, and which are torch's GEMM. Crossovers measured on Zen 5: with AVX-512 the
// engine multiplies twice as fast as torch's GEMM, with AVX2 as fast, with 128-bit vectors less than half as fast:
// there it only saves calls. Its sum of outer products needs each thread's [C, D] in the second-level cache; a larger
// factor needs enough rows to pay for packing it. torch's GEMM with bfloat16 instructions multiplies three times as
// fast.
struct OwnProducts {
  bool forward, gradient;

  OwnProducts(const LastLayerSizes& sizes, ScalarType type);
  explicit OwnProducts(const LastLayerCall& call) : OwnProducts(call.sizes, call.operands.features.scalar_type()) {}
  bool all(LastLayerResult result) const { return result == LastLayerResult::gradient ? gradient : forward; }
};

// The whole call; out[j] is the operator's j-th result (native.h).
// False, with nothing written: a product is left to torch's GEMM, or the rows of an operand are not dense.
bool run_last_layer(const LastLayerCall& call, DLTensor* const* out);

using OptionalTensor = std::optional<Tensor>;

// The whole call behind torch.ops: arguments of any strides and sizes, new tensors as results. The second of two
// results is an empty vector if the direction has no bias.
std::array<OptionalTensor, 2> call_last_layer(LastLayerOperands<OptionalTensor> operands, LastLayerCall call);

// The tensor itself if the elements of a row lie side by side, else a contiguous copy.
inline OptionalTensor dense_rows(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return tensor;
  const int64_t last = tensor->dim() - 1;
  return tensor->size(last) <= 1 || tensor->stride(last) == 1 ? tensor : torch::stable::contiguous(*tensor);
}

}  // namespace fastmeta
