// scale (h_u h_H^T + 1) r_H, in the association order that takes fewer multiplications.
#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "last_layer.h"

namespace fastmeta {

namespace {

void check(const View& features_u, const View& features_h, const View& residual_h, double scale) {
  check_finite(scale, "scale");
  check_matrix(features_u, "features_u", "[Nu, D]");
  check_matrix(features_h, "features_h", "[Nh, D]");
  check_matrix(residual_h, "residual_h", "[Nh, C]");
  check_shape(features_h, "features_h", "[Nh, D]", features_h.size(0), features_u.size(1));
  check_shape(residual_h, "residual_h", "[Nh, C]", features_h.size(0), residual_h.size(1));
  check_like(features_h, "features_h", features_u, "features_u");
  check_like(residual_h, "residual_h", features_u, "features_u");
}

bool gram_is_cheaper(const View& features_u, const View& residual_h) {
  const auto u = static_cast<double>(features_u.size(0)), h = static_cast<double>(residual_h.size(0));
  const auto d = static_cast<double>(features_u.size(1)), c = static_cast<double>(residual_h.size(1));
  return u * h * (d + c) < (u + h) * d * c;
}

// G = r^T h_H and g_b = sum r, kept in the accumulation type, are a last-layer gradient, scale (h_u G^T + g_b) the
// logit tangents along it.
template <class A>
bool own_similarity(const View& features_u, const View& features_h, const View& residual_h, double scale, bool bias,
                    DLTensor* out) {
  const int64_t num_features = features_h.size(1), outputs = residual_h.size(1);
  const Buffer<A> sums(outputs * (num_features + 1));
  int64_t shape[] = {outputs, num_features}, strides[] = {num_features, 1};
  DLTensor weight = *out, total = *out;  // the device
  weight.dtype = total.dtype = {kDLFloat, 8 * sizeof(A), 1};
  weight.data = sums.data();
  weight.byte_offset = total.byte_offset = 0;
  weight.shape = shape;
  weight.strides = strides;
  total.data = sums.data() + outputs * num_features;
  total.ndim = 1;
  total.shape = shape;
  total.strides = strides + 1;
  int64_t none = 0;
  if (!bias) total.shape = &none;
  DLTensor* const sum_out[] = {&weight, &total};
  DLTensor* const spread_out[] = {out};
  const LastLayerCall sum{.operands = {.features = features_h, .tangent = residual_h},
                          .function = RowFunction::tangent,
                          .result = LastLayerResult::gradient,
                          .sizes = {features_h.size(0), num_features, outputs}};
  const LastLayerCall spread{
      .operands = {.features = features_u, .direction_weight = &weight, .direction_bias = bias ? &total : nullptr},
      .function = RowFunction::tangent,
      .result = LastLayerResult::rows,
      .scale = scale,
      .sizes = {features_u.size(0), num_features, outputs}};
  return OwnProducts(spread).forward && run_last_layer(sum, sum_out) && run_last_layer(spread, spread_out);
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
  Combination<A> combination{.parts = matrix_of(TensorView(product)),
                             .rows = product.size(0),
                             .columns = product.size(1),
                             .scale = static_cast<A>(scale),
                             .out = matrix_of(TensorView(out))};
  OptionalTensor total;  // [C], added to every row
  if (bias) {
    const int64_t rows[] = {0};
    total =
        torch::stable::sum(residual_h, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1), false, accumulation_type<A>);
    combination.addend = matrix_of(TensorView(total));
    combination.addend.stride = 0;
    combination.factor = static_cast<A>(scale);
  }
  run_combination(combination);
  return out;
}

}  // namespace

bool feature_similarity(const DLTensor* const* tensors, const double* numbers, DLTensor* const* out, void*) {
  const View features_u = tensors[0], features_h = tensors[1], residual_h = tensors[2];
  check(features_u, features_h, residual_h, numbers[0]);
  if (gram_is_cheaper(features_u, residual_h)) return false;
  if (!features_u.has_dense_rows() || !features_h.has_dense_rows() || !residual_h.has_dense_rows()) return false;
  return with_accumulation(features_u.scalar_type(), [&](auto zero) {
    return own_similarity<decltype(zero)>(features_u, features_h, residual_h, numbers[0], numbers[1] != 0, out[0]);
  });
}

static Tensor feature_similarity_tensors(const Tensor& features_u,   // [Nu, D]
                                         const Tensor& features_h,   // [Nh, D]
                                         const Tensor& residual_h,   // [Nh, C]
                                         double scale, bool bias) {  // -> [Nu, C]
  const TensorView given[] = {features_u, features_h, residual_h};
  check(given[0], given[1], given[2], scale);
  const bool gram = gram_is_cheaper(given[0], given[2]);
  if (!gram) {
    const OptionalTensor dense[] = {dense_rows(features_u), dense_rows(features_h), dense_rows(residual_h)};
    const TensorView views[] = {*dense[0], *dense[1], *dense[2]};
    const Tensor out = torch::stable::new_empty(features_u, {features_u.size(0), residual_h.size(1)});
    TensorView result(out);
    const DLTensor* const tensors[] = {views[0].get(), views[1].get(), views[2].get()};
    const double numbers[] = {scale, static_cast<double>(bias)};
    DLTensor* const results[] = {result.get()};
    if (feature_similarity(tensors, numbers, results, nullptr)) return out;
  }
  return with_accumulation(features_u.scalar_type(), [&](auto zero) {
    return gemm_similarity<decltype(zero)>(features_u, features_h, residual_h, scale, bias, gram);
  });
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("feature_similarity", TORCH_BOX(&fastmeta::feature_similarity_tensors));
}
