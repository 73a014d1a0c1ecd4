// (w c(z))^T h + damping V and sum_i w_i c(z_i) + damping b with z = h V^T + b, for at most 32 outputs.
#include "cuda/narrow_gradient.h"

namespace fastmeta {
namespace {

std::tuple<Tensor, Tensor> hessian_vector_product_narrow(const Tensor& features,                       // [N, D]
                                                         const Tensor& logits,                         // [N, C]
                                                         const Tensor& direction_weight,               // [C, D]
                                                         const std::optional<Tensor>& direction_bias,  // [C]
                                                         const std::optional<Tensor>& weights,         // [N]
                                                         int64_t loss, double damping) {  // -> [C, D], [C] or [0]
  const Loss checked = check_loss(loss);
  STD_TORCH_CHECK(std::isfinite(damping) && damping >= 0, "damping must be finite and >= 0, got ", damping);
  const LastLayerSizes sizes = check_outputs(features, logits, std::nullopt, std::nullopt);
  check_direction(sizes, direction_weight, direction_bias, features);
  check_weights(sizes, weights, features);
  check_narrow(sizes, features);
  const WeightAndBias sum(sizes, features, direction_bias.has_value());
  with_narrow_type(features, [&](auto zero) {
    auto a = narrow_arguments<decltype(zero)>(sizes, checked, features, logits, std::nullopt, std::nullopt,
                                              std::nullopt, weights, direction_weight, direction_bias);
    a.damping = static_cast<float>(damping);
    run_narrow_gradient<RowResult::hessian>("hessian_vector_product", a, sum);
  });
  return {sum.weight, sum.bias};
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("hessian_vector_product_narrow", TORCH_BOX(&fastmeta::hessian_vector_product_narrow));
}
