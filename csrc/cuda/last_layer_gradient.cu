// (w r)^T h and the sum of w r, for at most 32 outputs.
#include "cuda/narrow_gradient.h"

namespace fastmeta {

bool cuda::last_layer_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out,
                               void* stream) {
  return run_narrow_gradient<RowResult::gradient>("last_layer_gradient", last_layer_gradient_call(tensors, numbers),
                                                  out, stream);
}

}  // namespace fastmeta
