// y - step (softmax(f+) - softmax(f-)) / epsilon, projected to the simplex if asked.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "tensors.h"

namespace fastmeta {

Tensor finite_difference_labels(const Tensor& logits_plus,    // [N, C]
                                const Tensor& logits_minus,   // [N, C]
                                const Tensor& labels,         // [N, C]
                                const Tensor& epsilon,        // one element
                                double step, bool project) {  // -> [N, C]
  check_finite(step, "step");
  check_matrix(logits_plus, "logits_plus", "[N, C]");
  const int64_t rows = logits_plus.size(0), outputs = logits_plus.size(1);
  check_shape(logits_minus, "logits_minus", "[N, C]", rows, outputs);
  check_shape(labels, "labels", "[N, C]", rows, outputs);
  check_like(logits_minus, "logits_minus", logits_plus, "logits_plus");
  check_like(labels, "labels", logits_plus, "logits_plus");
  check_floating(epsilon, "epsilon");
  STD_TORCH_CHECK(epsilon.numel() == 1, "epsilon must be a floating tensor of one element, got ", shape_of(epsilon));
  STD_TORCH_CHECK(epsilon.device() == logits_plus.device(), "epsilon must be on the device of logits_plus");
  const Tensor out = torch::stable::new_empty(logits_plus, {rows, outputs});
  if (rows == 0 || outputs == 0) return out;
  const double divisor = *torch::stable::to(epsilon, ScalarType::Double).const_data_ptr<double>();
  const Tensor plus = dense_rows(logits_plus), minus = dense_rows(logits_minus), before = dense_rows(labels);
  return with_accumulation(logits_plus, [&](auto zero) {
    using A = decltype(zero);
    const RowKernels<A>& kernels = row_kernels<A>();
    const LabelStep<A> label_step{.plus = matrix_of(plus),
                                  .minus = matrix_of(minus),
                                  .labels = matrix_of(before),
                                  .out = matrix_of(out),
                                  .outputs = outputs,
                                  .step = static_cast<A>(step / divisor),
                                  .project = project};
    const double operations = static_cast<double>(rows) * (64.0 + 48.0 * static_cast<double>(outputs / kernels.lanes));
    for_chunks(rows, parallel_chunks(rows, operations),
               [&](int64_t begin, int64_t end, int64_t) { kernels.label_step(label_step, begin, end); });
    return out;
  });
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("finite_difference_labels", TORCH_BOX(&fastmeta::finite_difference_labels));
}
