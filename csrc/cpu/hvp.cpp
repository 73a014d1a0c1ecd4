// (w c(z))^T h + damping V and sum_i w_i c(z_i) + damping b with z = h V^T + b.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "last_layer.h"

namespace fastmeta {

std::tuple<Tensor, Tensor> hessian_vector_product(const Tensor& features,                       // [N, D]
                                                  const Tensor& logits,                         // [N, C]
                                                  const Tensor& direction_weight,               // [C, D]
                                                  const std::optional<Tensor>& direction_bias,  // [C]
                                                  const std::optional<Tensor>& weights,         // [N]
                                                  int64_t loss, double damping) {               // -> [C, D], [C] or [0]
  const Loss checked = check_loss(loss);
  STD_TORCH_CHECK(std::isfinite(damping) && damping >= 0, "damping must be finite and >= 0, got ", damping);
  const LastLayerSizes sizes = check_outputs(features, logits, std::nullopt, std::nullopt);
  check_direction(sizes, direction_weight, direction_bias, features);
  check_weights(sizes, weights, features);
  return with_accumulation(features, [&](auto zero) {
    LastLayer<decltype(zero)> layer(sizes,
                                    {.features = features,
                                     .logits = logits,
                                     .weights = weights,
                                     .direction_weight = direction_weight,
                                     .direction_bias = direction_bias},
                                    checked, RowFunction::curvature);
    return layer.gradient(direction_bias.has_value(), damping);
  });
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("hessian_vector_product", TORCH_BOX(&fastmeta::hessian_vector_product));
}
