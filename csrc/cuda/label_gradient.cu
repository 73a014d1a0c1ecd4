// scale * t(z_i) with z = h V^T + b, for at most 32 outputs.
#include "cuda/narrow_rows.h"

namespace fastmeta {

bool cuda::label_gradient(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void* stream) {
  return run_narrow_rows<RowResult::label_gradient>("label_gradient", label_gradient_call(tensors, numbers), out,
                                                    stream);
}

}  // namespace fastmeta
