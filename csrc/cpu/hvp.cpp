// (w c(z))^T h + damping V and sum_i w_i c(z_i) + damping b with z = h V^T + b.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "last_layer.h"

namespace fastmeta {

bool hessian_vector_product(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void*) {
  return run_last_layer(hessian_vector_product_call(tensors, numbers), out);
}

static std::tuple<Tensor, Tensor> hessian_vector_product_tensors(const Tensor& features,          // [N, D]
                                                                 const Tensor& logits,            // [N, C]
                                                                 const OptionalTensor& targets,   // [N, C], int64 [N]
                                                                 const Tensor& direction_weight,  // [C, D]
                                                                 const OptionalTensor& direction_bias,  // [C]
                                                                 const OptionalTensor& weights,         // [N]
                                                                 int64_t loss,
                                                                 double damping) {  // -> [C, D], [C] or [0]
  const auto out = call_last_layer({.features = features,
                                    .logits = logits,
                                    .targets = targets,
                                    .weights = weights,
                                    .direction_weight = direction_weight,
                                    .direction_bias = direction_bias},
                                   {.function = RowFunction::curvature,
                                    .result = LastLayerResult::gradient,
                                    .loss = check_loss(loss),
                                    .damping = damping});
  return {*out[0], *out[1]};
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("hessian_vector_product", TORCH_BOX(&fastmeta::hessian_vector_product_tensors));
}
