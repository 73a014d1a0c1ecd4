// scale * t(z_i) with z = h V^T + b, for at most 32 outputs.
#include "cuda/narrow_rows.h"
#include "cuda/operators.h"

namespace fastmeta {

bool cuda::label_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream) {
  return run_narrow_rows<RowResult::label_gradient>("label_gradient", label_gradient_call(tensors, numbers), out,
                                                    stream);
}

static Tensor label_gradient_narrow(const Tensor& features,                       // [N, D]
                                    const std::optional<Tensor>& logits,          // [N, C], or
                                    const std::optional<Tensor>& head_weight,     // [C, D]
                                    const std::optional<Tensor>& head_bias,       // [C]
                                    const std::optional<Tensor>& targets,         // [N, C] or int64 [N]
                                    const Tensor& direction_weight,               // [C, D]
                                    const std::optional<Tensor>& direction_bias,  // [C]
                                    int64_t loss, double scale) {                 // -> [N, C]
  const TensorView views[] = {features, logits, head_weight, head_bias, targets, direction_weight, direction_bias};
  const Tensor out = torch::stable::new_empty(features, {features.size(0), direction_weight.size(0)});
  cuda::run_tensors(cuda::label_gradient, views, {static_cast<double>(loss), scale}, {out});
  return out;
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("label_gradient_narrow", TORCH_BOX(&fastmeta::label_gradient_narrow));
}
