// G = R^T h and g_b = sum_i R_i with R = w r.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "last_layer.h"

namespace fastmeta {

std::tuple<Tensor, Tensor> last_layer_gradient(const Tensor& features,                    // [N, D]
                                               const std::optional<Tensor>& logits,       // [N, C], or
                                               const std::optional<Tensor>& head_weight,  // [C, D]
                                               const std::optional<Tensor>& head_bias,    // [C]
                                               const Tensor& targets,                     // [N, C] or int64 [N]
                                               const std::optional<Tensor>& weights,      // [N]
                                               int64_t loss) {                            // -> [C, D], [C]
  const Loss checked = check_loss(loss);
  const LastLayerSizes sizes = check_outputs(features, logits, head_weight, head_bias);
  check_targets(sizes, targets, features);
  check_weights(sizes, weights, features);
  return with_accumulation(features, [&](auto zero) {
    LastLayer<decltype(zero)> layer(sizes,
                                    {.features = features,
                                     .logits = logits,
                                     .head_weight = head_weight,
                                     .head_bias = head_bias,
                                     .targets = targets,
                                     .weights = weights},
                                    checked, RowFunction::residual);
    return layer.gradient(true, 0.0);
  });
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("last_layer_gradient", TORCH_BOX(&fastmeta::last_layer_gradient));
}
