// (w c(z))^T h + damping V and sum_i w_i c(z_i) + damping b with z = h V^T + b, for at most 32 outputs.
#include <tuple>

#include "cuda/narrow_gradient.h"
#include "cuda/operators.h"

namespace fastmeta {

bool cuda::hessian_vector_product(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out,
                                  void* stream) {
  return run_narrow_gradient<RowResult::hessian>("hessian_vector_product",
                                                 hessian_vector_product_call(tensors, numbers), out, stream);
}

static std::tuple<Tensor, Tensor> hessian_vector_product_narrow(
    const Tensor& features,                       // [N, D]
    const Tensor& logits,                         // [N, C]
    const std::optional<Tensor>& targets,         // [N, C], int64 [N]
    const Tensor& direction_weight,               // [C, D]
    const std::optional<Tensor>& direction_bias,  // [C]
    const std::optional<Tensor>& weights,         // [N]
    int64_t loss,
    double damping) {  // -> [C, D], [C] or [0]
  const TensorView views[] = {features, logits, targets, direction_weight, direction_bias, weights};
  const int64_t outputs = direction_weight.size(0);
  const Tensor weight = torch::stable::new_empty(features, {outputs, features.size(1)});
  const Tensor bias = torch::stable::new_empty(features, {direction_bias.has_value() ? outputs : 0});
  cuda::run_tensors(cuda::hessian_vector_product, views, {static_cast<double>(loss), damping}, {weight, bias});
  return {weight, bias};
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("hessian_vector_product_narrow", TORCH_BOX(&fastmeta::hessian_vector_product_narrow));
}
