// (w c(z))^T h + damping V and sum_i w_i c(z_i) + damping b with z = h V^T + b, for at most 32 outputs.
#include "cuda/narrow_gradient.h"

namespace fastmeta {

bool cuda::hessian_vector_product(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out,
                                  void* stream) {
  return run_narrow_gradient<RowResult::hessian>("hessian_vector_product",
                                                 hessian_vector_product_call(tensors, numbers), out, stream);
}

}  // namespace fastmeta
