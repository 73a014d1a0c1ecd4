// The CPU's operators as functions of memory (native.h), in the order of arguments of their schemas.
#pragma once

#include "../native.h"

namespace fastmeta {

bool per_example_dot(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool label_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool last_layer_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool hessian_vector_product(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool feature_similarity(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool finite_difference_labels(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out,
                              void* stream);
bool masked_adam_(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);

}  // namespace fastmeta
