// The losses and what the kernels ask of them; losses.h has their row functions. fastmeta/losses.py has the same table,
// in the same order (tests/test_losses.py compares the two).
#pragma once

#include <cmath>

namespace fastmeta {

// clang-format off
//       name                  has a    targets are read by
//                             softmax  label tangent  curvature
#define FASTMETA_LOSSES(LOSS)                                    \
  LOSS(cross_entropy,          true,    false,         false)    \
  LOSS(binary_cross_entropy,   false,   false,         false)    \
  LOSS(mse,                    false,   false,         false)    \
  LOSS(mse_probs,              true,    false,         false)    \
  LOSS(mse_tanh,               false,   true,          false)    \
  LOSS(huber,                  false,   true,          true)
// clang-format on

#define FASTMETA_LOSS_CODE(name, ...) name,
enum class Loss : int { FASTMETA_LOSSES(FASTMETA_LOSS_CODE) };
#undef FASTMETA_LOSS_CODE

struct LossProperties {
  const char* name;
  bool has_softmax;  // the entries of a row depend on each other
  bool label_tangent_reads_targets, curvature_reads_targets;
};

#define FASTMETA_LOSS_PROPERTIES(name, ...) {#name, __VA_ARGS__},
constexpr LossProperties loss_table[] = {FASTMETA_LOSSES(FASTMETA_LOSS_PROPERTIES)};
#undef FASTMETA_LOSS_PROPERTIES
constexpr int num_losses = sizeof(loss_table) / sizeof(loss_table[0]);

// What becomes of a row: one of the row functions of its loss (losses.h), or the logit tangent itself.
enum class RowFunction : int { residual, label_tangent, curvature, tangent };

constexpr bool has_softmax(Loss loss) { return loss_table[static_cast<int>(loss)].has_softmax; }

// The logit of no output: of probability 0 where there is a softmax.
constexpr double softmax_padding = -HUGE_VAL;
constexpr double padding_logit(Loss loss) { return has_softmax(loss) ? softmax_padding : 0.0; }

constexpr bool reads_targets(Loss loss, RowFunction function) {
  const LossProperties& properties = loss_table[static_cast<int>(loss)];
  return function == RowFunction::residual ||
         (function == RowFunction::label_tangent && properties.label_tangent_reads_targets) ||
         (function == RowFunction::curvature && properties.curvature_reads_targets);
}

}  // namespace fastmeta
