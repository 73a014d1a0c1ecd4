// scale * t(z_i) with z = h V^T + b.
#include <torch/csrc/stable/library.h>

#include "last_layer.h"

namespace fastmeta {

bool label_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void*) {
  return run_last_layer(label_gradient_call(tensors, numbers), out);
}

static Tensor label_gradient_tensors(const Tensor& features,                // [N, D]
                                     const OptionalTensor& logits,          // [N, C], or
                                     const OptionalTensor& head_weight,     // [C, D]
                                     const OptionalTensor& head_bias,       // [C]
                                     const OptionalTensor& targets,         // [N, C] or int64 [N]
                                     const Tensor& direction_weight,        // [C, D]
                                     const OptionalTensor& direction_bias,  // [C]
                                     int64_t loss, double scale) {          // -> [N, C]
  return *call_last_layer({.features = features,
                           .logits = logits,
                           .head_weight = head_weight,
                           .head_bias = head_bias,
                           .targets = targets,
                           .direction_weight = direction_weight,
                           .direction_bias = direction_bias},
                          {.function = RowFunction::label_tangent,
                           .result = LastLayerResult::rows,
                           .loss = check_loss(loss),
                           .scale = scale})[0];
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("label_gradient", TORCH_BOX(&fastmeta::label_gradient_tensors)); }
