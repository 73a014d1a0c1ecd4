// <grad l_i, (V, b)> = <r_i, z_i> with z = h V^T + b.
#include <torch/csrc/stable/library.h>

#include "last_layer.h"

namespace fastmeta {

bool per_example_dot(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void*) {
  return run_last_layer(per_example_dot_call(tensors, numbers), out);
}

static Tensor per_example_dot_tensors(const Tensor& features,                // [N, D]
                                      const OptionalTensor& logits,          // [N, C], or
                                      const OptionalTensor& head_weight,     // [C, D]
                                      const OptionalTensor& head_bias,       // [C]
                                      const Tensor& targets,                 // [N, C] or int64 [N]
                                      const Tensor& direction_weight,        // [C, D]
                                      const OptionalTensor& direction_bias,  // [C]
                                      int64_t loss) {                        // -> [N]
  return *call_last_layer(
      {.features = features,
       .logits = logits,
       .head_weight = head_weight,
       .head_bias = head_bias,
       .targets = targets,
       .direction_weight = direction_weight,
       .direction_bias = direction_bias},
      {.function = RowFunction::residual, .result = LastLayerResult::dots, .loss = check_loss(loss)})[0];
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("per_example_dot", TORCH_BOX(&fastmeta::per_example_dot_tensors));
}
