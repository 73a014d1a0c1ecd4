// y - step (softmax f+ - softmax f-) / epsilon, projected to the simplex if asked.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "last_layer.h"

namespace fastmeta {

namespace {

// One number of any floating type.
double number_at(const View& tensor) {
  alignas(64) double wide[8];
  alignas(64) float single[16];
  const Matrix matrix{tensor.data(), 0, element_of(tensor.scalar_type())};
  if (tensor.scalar_type() == ScalarType::Double) {
    row_kernels<double>().widen(matrix, 1, wide);
    return wide[0];
  }
  row_kernels<float>().widen(matrix, 1, single);
  return single[0];
}

template <class A>
void run(const View (&logits)[2], const View& labels, double step, bool project, const View& out) {
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t rows = out.size(0), outputs = out.size(1);
  const FiniteDifferenceStep<A> label_step{.plus = matrix_of(logits[0]),
                                           .minus = matrix_of(logits[1]),
                                           .labels = matrix_of(labels),
                                           .out = matrix_of(out),
                                           .outputs = outputs,
                                           .step = static_cast<A>(step),
                                           .project = project};
  const auto kernel = outputs <= few_outputs ? kernels.step_columns : kernels.step_rows;
  const double operations = static_cast<double>(rows) * (64.0 + 48.0 * static_cast<double>(outputs / kernels.lanes));
  for_chunks(rows, parallel_chunks(rows, operations),
             [&](int64_t begin, int64_t end, int64_t) { kernel(label_step, begin, end); });
}

void check(const View& logits_plus, const View& logits_minus, const View& labels, const View& epsilon, double step) {
  check_finite(step, "step");
  check_matrix(logits_plus, "logits_plus", "[N, C]");
  const int64_t rows = logits_plus.size(0), outputs = logits_plus.size(1);
  check_shape(logits_minus, "logits_minus", "[N, C]", rows, outputs);
  check_shape(labels, "labels", "[N, C]", rows, outputs);
  check_like(logits_minus, "logits_minus", logits_plus, "logits_plus");
  check_like(labels, "labels", logits_plus, "logits_plus");
  check_floating(epsilon, "epsilon");
  STD_TORCH_CHECK(epsilon.numel() == 1, "epsilon must be a floating tensor of one element, got ", shape_of(epsilon));
  STD_TORCH_CHECK(epsilon.is_on_device_of(logits_plus), "epsilon must be on the device of logits_plus");
}

}  // namespace

bool finite_difference_labels(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void*) {
  const View plus = tensors[0], minus = tensors[1], labels = tensors[2], epsilon = tensors[3];
  check(plus, minus, labels, epsilon, numbers[0]);
  if (!plus.has_dense_rows() || !minus.has_dense_rows() || !labels.has_dense_rows()) return false;
  if (labels.numel() == 0) return true;
  const double step = numbers[0] / number_at(epsilon);
  const bool project = numbers[1] != 0;
  if (plus.scalar_type() == ScalarType::Double) {
    run<double>({plus, minus}, labels, step, project, out[0]);
  } else {
    run<float>({plus, minus}, labels, step, project, out[0]);
  }
  return true;
}

static Tensor finite_difference_labels_tensors(const Tensor& logits_plus,    // [N, C]
                                               const Tensor& logits_minus,   // [N, C]
                                               const Tensor& labels,         // [N, C]
                                               const Tensor& epsilon,        // one element
                                               double step, bool project) {  // -> [N, C]
  const TensorView plus(logits_plus), minus(logits_minus), before(labels), divisor(epsilon);
  check(plus, minus, before, divisor, step);
  const Tensor out = torch::stable::new_empty(logits_plus, {logits_plus.size(0), logits_plus.size(1)});
  const OptionalTensor dense[] = {dense_rows(logits_plus), dense_rows(logits_minus), dense_rows(labels)};
  const TensorView views[] = {*dense[0], *dense[1], *dense[2]};
  TensorView result(out);
  const DLTensor* const tensors[] = {views[0].get(), views[1].get(), views[2].get(), divisor.get()};
  const double numbers[] = {step, static_cast<double>(project)};
  DLTensor* const results[] = {result.get()};
  finite_difference_labels(tensors, numbers, results, nullptr);
  return out;
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("finite_difference_labels", TORCH_BOX(&fastmeta::finite_difference_labels_tensors));
}
