// (w r)^T h and the sum of w r, for at most 32 outputs.
#include <tuple>

#include "cuda/narrow_gradient.h"
#include "cuda/operators.h"

namespace fastmeta {

bool cuda::last_layer_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out,
                               void* stream) {
  return run_narrow_gradient<RowResult::gradient>("last_layer_gradient", last_layer_gradient_call(tensors, numbers),
                                                  out, stream);
}

static std::tuple<Tensor, Tensor> last_layer_gradient_narrow(const Tensor& features,                    // [N, D]
                                                             const std::optional<Tensor>& logits,       // [N, C], or
                                                             const std::optional<Tensor>& head_weight,  // [C, D]
                                                             const std::optional<Tensor>& head_bias,    // [C]
                                                             const Tensor& targets,  // [N, C] or int64 [N]
                                                             const std::optional<Tensor>& weights,  // [N]
                                                             int64_t loss) {                        // -> [C, D], [C]
  const TensorView views[] = {features, logits, head_weight, head_bias, targets, weights};
  const int64_t outputs = logits.has_value() ? logits->size(1) : head_weight.value().size(0);
  const Tensor weight = torch::stable::new_empty(features, {outputs, features.size(1)});
  const Tensor bias = torch::stable::new_empty(features, {outputs});
  cuda::run_tensors(cuda::last_layer_gradient, views, {static_cast<double>(loss)}, {weight, bias});
  return {weight, bias};
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("last_layer_gradient_narrow", TORCH_BOX(&fastmeta::last_layer_gradient_narrow));
}
