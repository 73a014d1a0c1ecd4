// Every operator: its schema, and its function of memory on the CPU. Argument `loss` is the enum of loss.h; a head
// (head_weight [C, D], head_bias [C]) stands in for logits [N, C] where both are offered; optional targets are read
// where the loss's row function reads them. fastmeta/ops/ documents the arguments.
#include <torch/csrc/stable/library.h>

#include "native.h"

#ifndef FASTMETA_NAMESPACE
#define FASTMETA_NAMESPACE fastmeta
#endif
#define FASTMETA_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)  // `name` is a macro: it is replaced first

FASTMETA_LIBRARY(FASTMETA_NAMESPACE, m) {
  m.def(
      "last_layer_gradient(Tensor features, Tensor? logits, Tensor? head_weight, Tensor? head_bias, Tensor targets, "
      "Tensor? weights, int loss) -> (Tensor, Tensor)");
  m.def(
      "per_example_dot(Tensor features, Tensor? logits, Tensor? head_weight, Tensor? head_bias, Tensor targets, "
      "Tensor direction_weight, Tensor? direction_bias, int loss) -> Tensor");
  m.def(
      "label_gradient(Tensor features, Tensor? logits, Tensor? head_weight, Tensor? head_bias, Tensor? targets, "
      "Tensor direction_weight, Tensor? direction_bias, int loss, float scale) -> Tensor");
  // The bias of the result is empty when direction_bias is None.
  m.def(
      "hessian_vector_product(Tensor features, Tensor logits, Tensor? targets, Tensor direction_weight, "
      "Tensor? direction_bias, Tensor? weights, int loss, float damping) -> (Tensor, Tensor)");
  m.def(
      "feature_similarity(Tensor features_u, Tensor features_h, Tensor residual_h, float scale, bool bias) -> Tensor");
  m.def(
      "finite_difference_labels(Tensor logits_plus, Tensor logits_minus, Tensor labels, Tensor epsilon, float step, "
      "bool project) -> Tensor");
  // Every iteration of a solve, on CUDA alone (fastmeta/ops/solve/conjugate_gradient.py).
  m.def(
      "conjugate_gradient(Tensor features, Tensor logits, Tensor? targets, Tensor? signs, Tensor rhs, Tensor target, "
      "int loss, float damping, int max_iter) -> (Tensor, Tensor)");
  // Lists of tensors, in place.
  m.def("perturb_epsilon(Tensor[] direction, float radius) -> Tensor");
  m.def(
      "perturb_(Tensor(a!)[] params, Tensor[] direction, Tensor(b!) backup, Tensor epsilon, float sign, bool save) -> "
      "()");
  m.def("perturb_restore_(Tensor(a!)[] params, Tensor(b!) backup) -> ()");
  m.def(
      "alignment_direction_(Tensor[] grads_labeled, Tensor[] grads_unlabeled, Tensor(a!)[] ema_labeled, "
      "Tensor(b!)[] ema_fourth, Tensor(c!)[] out, float decay, float decay_norm, float epsilon) -> ()");
  m.def(
      "masked_adam_(Tensor(a!) table, Tensor index, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!) steps, float lr, float beta1, float beta2, float eps, float? low, float? high) -> ()");
  // Of images; fastmeta/data/augment/ documents them, apply.py and crop.py.
  m.def(
      "augment(Tensor images, Tensor? moves, Tensor operations, Tensor levels, Tensor? places, int fill, int red, "
      "int green, int blue, bool reflected, bool unit) -> Tensor");
  m.def(
      "crop(Tensor images, Tensor columns, Tensor column_shares, Tensor rows, Tensor row_shares, bool unit) -> Tensor");
}

#ifndef FASTMETA_EMULATE

namespace fastmeta {

const NativeOperator* native_operators(int* count) {
  static constexpr NativeOperator operators[] = {
      {"per_example_dot", "cpu", 7, 1, 1, per_example_dot},
      {"label_gradient", "cpu", 7, 2, 1, label_gradient},
      {"last_layer_gradient", "cpu", 6, 1, 2, last_layer_gradient},
      {"hessian_vector_product", "cpu", 6, 2, 2, hessian_vector_product},
      {"feature_similarity", "cpu", 3, 2, 1, feature_similarity},
      {"finite_difference_labels", "cpu", 4, 2, 1, finite_difference_labels},
      {"masked_adam_", "cpu", 6, 6, 0, masked_adam_},
  };
  *count = static_cast<int>(sizeof(operators) / sizeof(operators[0]));
  return operators;
}

}  // namespace fastmeta

#endif
