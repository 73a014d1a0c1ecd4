// scale * t(z_i) with z = h V^T + b, for at most 32 outputs.
#include "cuda/narrow_rows.h"

namespace fastmeta {
namespace {

Tensor label_gradient_narrow(const Tensor& features,                       // [N, D]
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
  check_narrow(sizes, features);
  const Tensor out = torch::stable::new_empty(features, {sizes.examples, sizes.outputs});
  with_narrow_type(features, [&](auto zero) {
    auto a = narrow_arguments<decltype(zero)>(sizes, checked, features, logits, head_weight, head_bias, std::nullopt,
                                              std::nullopt, direction_weight, direction_bias);
    a.scale = static_cast<float>(scale);
    run_narrow_rows<RowResult::label_gradient>("label_gradient", a, out);
  });
  return out;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("label_gradient_narrow", TORCH_BOX(&fastmeta::label_gradient_narrow));
}
