#include "operators.h"

namespace fastmeta {

const NativeOperator* native_operators(int* count) {
  static constexpr NativeOperator operators[] = {
      {"per_example_dot", "cpu", 7, 1, 1, per_example_dot},
      {"label_gradient", "cpu", 7, 2, 1, label_gradient},
      {"last_layer_gradient", "cpu", 6, 1, 2, last_layer_gradient},
      {"hessian_vector_product", "cpu", 6, 2, 2, hessian_vector_product},
      {"feature_similarity", "cpu", 3, 2, 1, feature_similarity},
      {"finite_difference_labels", "cpu", 4, 2, 1, finite_difference_labels},
      {"masked_adam_", "cpu", 6, 6, 0, masked_adam_},
  };
  *count = static_cast<int>(sizeof(operators) / sizeof(operators[0]));
  return operators;
}

}  // namespace fastmeta
