// The operators of this folder as functions of memory (native.h), in the order of arguments of their schemas. The first
// four are for at most 32 outputs and no float64.
#pragma once

#include "native.h"

namespace fastmeta::cuda {

bool per_example_dot(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool label_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool last_layer_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool hessian_vector_product(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool masked_adam_(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);

}  // namespace fastmeta::cuda
