// The losses, in the order of LOSSES in fastmeta/losses.py.
#pragma once

namespace fastmeta {

enum class Loss : int { cross_entropy = 0, binary_cross_entropy = 1, mse = 2, mse_probs = 3 };
constexpr int num_losses = 4;

// The row functions of a loss (losses.h).
enum class RowFunction : int { residual, label_tangent, curvature };

}  // namespace fastmeta
