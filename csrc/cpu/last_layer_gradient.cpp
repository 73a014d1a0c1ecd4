// G = R^T h and g_b = sum_i R_i with R = w r.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "last_layer.h"

namespace fastmeta {

bool last_layer_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void*) {
  return run_last_layer(last_layer_gradient_call(tensors, numbers), out);
}

static std::tuple<Tensor, Tensor> last_layer_gradient_tensors(const Tensor& features,             // [N, D]
                                                              const OptionalTensor& logits,       // [N, C], or
                                                              const OptionalTensor& head_weight,  // [C, D]
                                                              const OptionalTensor& head_bias,    // [C]
                                                              const Tensor& targets,              // [N, C] or int64 [N]
                                                              const OptionalTensor& weights,      // [N]
                                                              int64_t loss) {                     // -> [C, D], [C]
  const auto out = call_last_layer(
      {.features = features,
       .logits = logits,
       .head_weight = head_weight,
       .head_bias = head_bias,
       .targets = targets,
       .weights = weights},
      {.function = RowFunction::residual, .result = LastLayerResult::gradient, .loss = check_loss(loss)});
  return {*out[0], *out[1]};
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("last_layer_gradient", TORCH_BOX(&fastmeta::last_layer_gradient_tensors));
}
