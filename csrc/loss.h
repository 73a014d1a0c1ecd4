// The losses, in the order of LOSSES in fastmeta/losses.py.
#pragma once

namespace fastmeta {

enum class Loss : int { cross_entropy = 0, binary_cross_entropy = 1, mse = 2, mse_probs = 3 };
constexpr int num_losses = 4;

}  // namespace fastmeta
