// The operators of this folder as functions of memory (native.h), in the order of arguments of their schemas, and how
// torch's tensors get there.
#pragma once

#include "cuda/launch.h"
#include "view.h"

namespace fastmeta::cuda {

bool per_example_dot(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool label_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool last_layer_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool hessian_vector_product(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);
bool masked_adam_(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream);

// Calls a function for few outputs, whose first arguments are the features, the logits and the head's weight or the
// direction's, on torch's current stream.
template <size_t inputs, size_t outputs>
void run_tensors(NativeFunction function, const TensorView (&views)[inputs], std::initializer_list<double> numbers,
                 const Tensor (&out)[outputs]) {
  const DLTensor* tensors[inputs];
  for (size_t i = 0; i < inputs; ++i) tensors[i] = views[i].get();
  TensorView results[outputs];
  DLTensor* written[outputs];
  for (size_t i = 0; i < outputs; ++i) {
    results[i] = TensorView(out[i], true);
    written[i] = results[i].get();
  }
  void* stream = current_stream(View(views[0]).device_index());
  STD_TORCH_CHECK(function(tensors, numbers.begin(), written, stream), "this kernel takes at most 32 outputs, got ",
                  views[1].get() ? View(views[1]).size(1) : View(views[2]).size(0), ", and no float64");
}

}  // namespace fastmeta::cuda
