// <r_i, z_i> with z = h V^T + b, for at most 32 outputs.
#include "cuda/narrow_rows.h"

namespace fastmeta {
namespace {

Tensor per_example_dot_narrow(const Tensor& features,                       // [N, D]
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
  check_narrow(sizes, features);
  Tensor out = torch::stable::new_empty(features, {sizes.examples});
  if (sizes.outputs == 0) return torch::stable::zero_(out);
  with_narrow_type(features, [&](auto zero) {
    const auto a = narrow_arguments<decltype(zero)>(sizes, checked, features, logits, head_weight, head_bias, targets,
                                                    std::nullopt, direction_weight, direction_bias);
    run_narrow_rows<RowResult::dot>("per_example_dot", a, out);
  });
  return out;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("per_example_dot_narrow", TORCH_BOX(&fastmeta::per_example_dot_narrow));
}
