// <grad l_i, (V, b)> = <r_i, z_i> with z = h V^T + b.
#include <torch/csrc/stable/library.h>

#include "last_layer.h"

namespace fastmeta {

Tensor per_example_dot(const Tensor& features,                       // [N, D]
                       const std::optional<Tensor>& logits,          // [N, C], or
                       const std::optional<Tensor>& head_weight,     // [C, D]
                       const std::optional<Tensor>& head_bias,       // [C]
                       const Tensor& targets,                        // [N, C] or int64 [N]
                       const Tensor& direction_weight,               // [C, D]
                       const std::optional<Tensor>& direction_bias,  // [C]
                       int64_t loss) {                               // -> [N]
  const Loss checked = check_loss(loss);
  const LastLayerSizes sizes = check_outputs(features, logits, head_weight, head_bias);
  check_targets(sizes, targets, features);
  check_direction(sizes, direction_weight, direction_bias, features);
  return with_accumulation(features, [&](auto zero) {
    LastLayer<decltype(zero)> layer(sizes,
                                    {.features = features,
                                     .logits = logits,
                                     .head_weight = head_weight,
                                     .head_bias = head_bias,
                                     .targets = targets,
                                     .direction_weight = direction_weight,
                                     .direction_bias = direction_bias},
                                    checked, RowFunction::residual);
    return layer.dots();
  });
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("per_example_dot", TORCH_BOX(&fastmeta::per_example_dot)); }
