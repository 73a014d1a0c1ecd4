// scale * t(z_i) with z = h V^T + b.
#include <torch/csrc/stable/library.h>

#include "last_layer.h"

namespace fastmeta {

Tensor label_gradient(const Tensor& features,                       // [N, D]
                      const std::optional<Tensor>& logits,          // [N, C], or
                      const std::optional<Tensor>& head_weight,     // [C, D]
                      const std::optional<Tensor>& head_bias,       // [C]
                      const Tensor& direction_weight,               // [C, D]
                      const std::optional<Tensor>& direction_bias,  // [C]
                      int64_t loss, double scale) {                 // -> [N, C]
  const Loss checked = check_loss(loss);
  check_finite(scale, "scale");
  const LastLayerSizes sizes = check_outputs(features, logits, head_weight, head_bias);
  check_direction(sizes, direction_weight, direction_bias, features);
  return with_accumulation(features, [&](auto zero) {
    LastLayer<decltype(zero)> layer(sizes,
                                    {.features = features,
                                     .logits = logits,
                                     .head_weight = head_weight,
                                     .head_bias = head_bias,
                                     .direction_weight = direction_weight,
                                     .direction_bias = direction_bias},
                                    checked, RowFunction::label_tangent);
    return layer.rows(scale);
  });
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("label_gradient", TORCH_BOX(&fastmeta::label_gradient)); }
