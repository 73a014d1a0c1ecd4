// (w r)^T h and the sum of w r, for at most 32 outputs.
#include "cuda/narrow_gradient.h"

namespace fastmeta {
namespace {

std::tuple<Tensor, Tensor> last_layer_gradient_narrow(const Tensor& features,                    // [N, D]
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
  check_narrow(sizes, features);
  const WeightAndBias sum(sizes, features, true);
  with_narrow_type(features, [&](auto zero) {
    const auto a = narrow_arguments<decltype(zero)>(sizes, checked, features, logits, head_weight, head_bias, targets,
                                                    weights, std::nullopt, std::nullopt);
    run_narrow_gradient<RowResult::gradient>("last_layer_gradient", a, sum);
  });
  return {sum.weight, sum.bias};
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("last_layer_gradient_narrow", TORCH_BOX(&fastmeta::last_layer_gradient_narrow));
}
