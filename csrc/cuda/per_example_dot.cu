// <r_i, z_i> with z = h V^T + b, for at most 32 outputs.
#include "cuda/narrow_rows.h"
#include "cuda/operators.h"

namespace fastmeta {

bool cuda::per_example_dot(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream) {
  return run_narrow_rows<RowResult::dot>("per_example_dot", per_example_dot_call(tensors, numbers), out, stream);
}

static Tensor per_example_dot_narrow(const Tensor& features,                       // [N, D]
                                     const std::optional<Tensor>& logits,          // [N, C], or
                                     const std::optional<Tensor>& head_weight,     // [C, D]
                                     const std::optional<Tensor>& head_bias,       // [C]
                                     const Tensor& targets,                        // [N, C] or int64 [N]
                                     const Tensor& direction_weight,               // [C, D]
                                     const std::optional<Tensor>& direction_bias,  // [C]
                                     int64_t loss) {                               // -> [N]
  const TensorView views[] = {features, logits, head_weight, head_bias, targets, direction_weight, direction_bias};
  const Tensor out = torch::stable::new_empty(features, {features.size(0)});
  cuda::run_tensors(cuda::per_example_dot, views, {static_cast<double>(loss)}, {out});
  return out;
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("per_example_dot_narrow", TORCH_BOX(&fastmeta::per_example_dot_narrow));
}
