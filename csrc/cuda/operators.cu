#include "native.h"

extern "C" __attribute__((visibility("default"))) const fastmeta::NativeOperator* fastmeta_cuda_operators(int* count) {
  using namespace fastmeta::cuda;
  static constexpr fastmeta::NativeOperator operators[] = {
      {"per_example_dot", "cuda", 7, 1, 1, per_example_dot},
      {"label_gradient", "cuda", 7, 2, 1, label_gradient},
      {"last_layer_gradient", "cuda", 6, 1, 2, last_layer_gradient},
      {"hessian_vector_product", "cuda", 6, 2, 2, hessian_vector_product},
      {"masked_adam_", "cuda", 6, 6, 0, masked_adam_},
  };
  *count = static_cast<int>(sizeof(operators) / sizeof(operators[0]));
  return operators;
}
