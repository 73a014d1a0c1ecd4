// A call of a last-layer operator, on the CPU and on CUDA: its arguments by name, checked.
#pragma once

#include "checks.h"

namespace fastmeta {

template <class T>
struct LastLayerOperands {
  T features;                          // [N, D]
  T logits;                            // [N, C], or
  T head_weight, head_bias;            // [C, D], [C]
  T targets;                           // [N, C] or int64 [N], where the row function reads them
  T weights;                           // [N]
  T direction_weight, direction_bias;  // [C, D], [C]
  T tangent;                           // [N, C] in place of a direction
};

// What is made of the rows.
enum class LastLayerResult {
  dots,     // [N]: <row, tangent>
  rows,     // [N, C]: scale * row
  gradient  // [C, D], [C] or [0]: row^T features and the sum of the rows, plus damping times the direction
};

struct LastLayerCall {
  LastLayerOperands<View> operands;
  RowFunction function;
  LastLayerResult result;
  Loss loss{};
  double scale = 1, damping = 0;
  LastLayerSizes sizes{};
};

// The call with its sizes; throws where an argument does not fit. The range of classes is not seen here.
inline LastLayerCall checked(LastLayerCall call) {
  LastLayerOperands<View>& x = call.operands;
  call.sizes = check_outputs(x.features, x.logits, x.head_weight, x.head_bias);
  if (reads_targets(call.loss, call.function)) {
    check_targets(call.sizes, x.targets, x.features);
  } else {
    x.targets = {};
  }
  if (call.function != RowFunction::residual || call.result == LastLayerResult::dots) {
    check_direction(call.sizes, x.direction_weight, x.direction_bias, x.features);
  }
  check_weights(call.sizes, x.weights, x.features);
  check_finite(call.scale, "scale");
  STD_TORCH_CHECK(std::isfinite(call.damping) && call.damping >= 0, "damping must be finite and >= 0, got ",
                  call.damping);
  return call;
}

// The calls from arguments in the order of the schemas (native.h).

inline LastLayerCall per_example_dot_call(const DLTensor* const* tensors, const double* numbers) {
  return checked({.operands = {.features = tensors[0],
                               .logits = tensors[1],
                               .head_weight = tensors[2],
                               .head_bias = tensors[3],
                               .targets = tensors[4],
                               .direction_weight = tensors[5],
                               .direction_bias = tensors[6]},
                  .function = RowFunction::residual,
                  .result = LastLayerResult::dots,
                  .loss = check_loss(numbers[0])});
}

inline LastLayerCall label_gradient_call(const DLTensor* const* tensors, const double* numbers) {
  return checked({.operands = {.features = tensors[0],
                               .logits = tensors[1],
                               .head_weight = tensors[2],
                               .head_bias = tensors[3],
                               .targets = tensors[4],
                               .direction_weight = tensors[5],
                               .direction_bias = tensors[6]},
                  .function = RowFunction::label_tangent,
                  .result = LastLayerResult::rows,
                  .loss = check_loss(numbers[0]),
                  .scale = numbers[1]});
}

inline LastLayerCall last_layer_gradient_call(const DLTensor* const* tensors, const double* numbers) {
  return checked({.operands = {.features = tensors[0],
                               .logits = tensors[1],
                               .head_weight = tensors[2],
                               .head_bias = tensors[3],
                               .targets = tensors[4],
                               .weights = tensors[5]},
                  .function = RowFunction::residual,
                  .result = LastLayerResult::gradient,
                  .loss = check_loss(numbers[0])});
}

inline LastLayerCall hessian_vector_product_call(const DLTensor* const* tensors, const double* numbers) {
  return checked({.operands = {.features = tensors[0],
                               .logits = tensors[1],
                               .targets = tensors[2],
                               .weights = tensors[5],
                               .direction_weight = tensors[3],
                               .direction_bias = tensors[4]},
                  .function = RowFunction::curvature,
                  .result = LastLayerResult::gradient,
                  .loss = check_loss(numbers[0]),
                  .damping = numbers[1]});
}

}  // namespace fastmeta
