// Operators as plain functions of memory: what the fast entry and the operators of torch.ops both call. No torch tensor
// is made or read here, so a call costs what its loop over the rows costs.
#pragma once

// The header is plain C, but torch hides it from code for the stable ABI.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

namespace fastmeta {

// tensors[i] is nullptr where the argument is absent; numbers come in the order of the schema (loss code, scale,
// damping, lr, ...), NaN stands for None. out[j] has its memory already: contiguous, in the dtype of tensors[0].
// stream is null on the CPU.
// Returns false for "not mine" (needs torch's GEMM, a copy, an unusual dtype): nothing was written. Throws a
// std::exception on bad arguments, before memory is touched.
using Native = bool(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
using NativeFunction = Native*;

Native per_example_dot, label_gradient, last_layer_gradient, hessian_vector_product, feature_similarity,
    finite_difference_labels, masked_adam_;
// The first four are for at most 32 outputs and no float64.
namespace cuda {
Native per_example_dot, label_gradient, last_layer_gradient, hessian_vector_product, masked_adam_;
}

struct NativeOperator {
  const char* name;
  const char* device;
  int num_tensors, num_numbers, num_outputs;
  NativeFunction run;
};

// Those for the CPU.
const NativeOperator* native_operators(int* count);

}  // namespace fastmeta

// Those for CUDA, exported by _C_cuda.so and found by dlsym after it is loaded.
extern "C" const fastmeta::NativeOperator* fastmeta_cuda_operators(int* count);
