// scale (h_u h_H^T + 1) r_H, in the association order that takes fewer multiplications.
#include <torch/csrc/stable/library.h>

#include "last_layer.h"

namespace fastmeta {

namespace {

bool gram_is_cheaper(int64_t count_u, int64_t count_h, int64_t features, int64_t outputs) {
  const double u = static_cast<double>(count_u), h = static_cast<double>(count_h);
  const double d = static_cast<double>(features), c = static_cast<double>(outputs);
  return u * h * (d + c) < (u + h) * d * c;
}

// G = r^T h_H and g_b = sum r, kept in the accumulation type, are a last-layer gradient, scale (h_u G^T + g_b) a label
// gradient along it; the label tangent of binary cross-entropy is the logit tangent itself.
template <class A>
Tensor own_similarity(const Tensor& features_u, const Tensor& features_h, const Tensor& residual_h, double scale,
                      bool bias) {
  const int64_t num_features = features_h.size(1), outputs = residual_h.size(1);
  LastLayer<A> sum({features_h.size(0), num_features, outputs}, {.features = features_h, .tangent = residual_h},
                   Loss::binary_cross_entropy, RowFunction::label_tangent);
  const auto [weight, total] = sum.gradient(bias, 0.0, accumulation_type<A>);
  LastLayer<A> spread({features_u.size(0), num_features, outputs},
                      {.features = features_u,
                       .direction_weight = weight,
                       .direction_bias = bias ? std::optional<Tensor>(total) : std::nullopt},
                      Loss::binary_cross_entropy, RowFunction::label_tangent);
  return spread.rows(scale);
}

template <class A>
Tensor gemm_similarity(const Tensor& features_u, const Tensor& features_h, const Tensor& residual_h, double scale,
                       bool bias, bool gram) {
  // Small products are not worth rounding the one between them to bfloat16 (the same size as in OwnProducts).
  const int64_t rows_in_all = features_u.size(0) + features_h.size(0);
  const bool small = rows_in_all * features_u.size(1) * residual_h.size(1) <= 2'000'000;
  const auto operand = [small](const Tensor& matrix) {
    const bool widen = small && matrix.scalar_type() == ScalarType::BFloat16;
    return widen ? torch::stable::to(matrix, ScalarType::Float) : gemm_operand(matrix);
  };
  const Tensor u = operand(features_u), h = operand(features_h), r = operand(residual_h);
  const Tensor product = gram ? gemm(gemm(u, transposed(h)), r) : gemm(u, gemm(transposed(h), r));
  if (!bias && scale == 1 && product.scalar_type() == features_u.scalar_type()) return product;
  const Tensor out = torch::stable::new_empty(features_u, {product.size(0), product.size(1)});
  Combination<A> combination{.parts = matrix_of(product),
                             .rows = product.size(0),
                             .columns = product.size(1),
                             .scale = static_cast<A>(scale),
                             .out = matrix_of(out)};
  std::optional<Tensor> total;  // [C], added to every row
  if (bias) {
    const int64_t rows[] = {0};
    total =
        torch::stable::sum(residual_h, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1), false, accumulation_type<A>);
    combination.addend = matrix_of(*total);
    combination.addend.stride = 0;
    combination.factor = static_cast<A>(scale);
  }
  run_combination(combination);
  return out;
}

}  // namespace

Tensor feature_similarity(const Tensor& features_u,   // [Nu, D]
                          const Tensor& features_h,   // [Nh, D]
                          const Tensor& residual_h,   // [Nh, C]
                          double scale, bool bias) {  // -> [Nu, C]
  check_finite(scale, "scale");
  check_matrix(features_u, "features_u", "[Nu, D]");
  check_matrix(features_h, "features_h", "[Nh, D]");
  check_matrix(residual_h, "residual_h", "[Nh, C]");
  check_shape(features_h, "features_h", "[Nh, D]", features_h.size(0), features_u.size(1));
  check_shape(residual_h, "residual_h", "[Nh, C]", features_h.size(0), residual_h.size(1));
  check_like(features_h, "features_h", features_u, "features_u");
  check_like(residual_h, "residual_h", features_u, "features_u");
  const int64_t outputs = residual_h.size(1);
  const bool gram = gram_is_cheaper(features_u.size(0), features_h.size(0), features_u.size(1), outputs);
  return with_accumulation(features_u, [&](auto zero) {
    using A = decltype(zero);
    const bool own = OwnProducts<A>({features_h.size(0), features_h.size(1), outputs}, features_h).gradient &&
                     OwnProducts<A>({features_u.size(0), features_u.size(1), outputs}, features_u).forward;
    if (!gram && own) return own_similarity<A>(features_u, features_h, residual_h, scale, bias);
    return gemm_similarity<A>(features_u, features_h, residual_h, scale, bias, gram);
  });
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("feature_similarity", TORCH_BOX(&fastmeta::feature_similarity)); }
