// The losses: three row functions each, the only per-loss code of every kernel, on the CPU and on the GPU.
// fastmeta/losses.py holds the same functions in PyTorch, with the table of formulas.
//
// A value V is a scalar or a SIMD vector. A row is `count` values; a thread of a GPU may hold only a part of it, and
// `reduce.sum(V)` and `reduce.max(V)` combine what the lanes of V, or the threads, hold of the same row. Lanes beyond
// the row's C entries hold padding_logit(loss) in f and 0 in y and z, and then count for nothing.
//
// On the CPU this file is included once for each instruction set, after vec.h and in that set's namespace, so that no
// function is shared between two of them. Elsewhere V is float or double and the namespace is fastmeta::scalar.
#include <cmath>

#include "loss.h"

#ifdef __CUDACC__
#define FASTMETA_ROW_FUNCTION __host__ __device__ __forceinline__
#define FASTMETA_TERM
#else
#define FASTMETA_ROW_FUNCTION inline __attribute__((always_inline))
#define FASTMETA_TERM __attribute__((always_inline))
#endif

#ifndef FASTMETA_TARGET
#define FASTMETA_TARGET scalar
namespace fastmeta::scalar {

// The operations that vec.h has for vectors.
template <class V>
FASTMETA_ROW_FUNCTION V splat(double x) {
  return static_cast<V>(x);
}
FASTMETA_ROW_FUNCTION float exp_nonpositive(float x) { return ::expf(x); }
FASTMETA_ROW_FUNCTION double exp_nonpositive(double x) { return ::exp(x); }

}  // namespace fastmeta::scalar
#endif

namespace fastmeta::FASTMETA_TARGET {

template <class V>
FASTMETA_ROW_FUNCTION V larger(V a, V b) {
  return a > b ? a : b;
}

// Logits with exp() = 0 where the loss has a softmax.
FASTMETA_ROW_FUNCTION double padding_logit(Loss loss) {
  return loss == Loss::cross_entropy || loss == Loss::mse_probs ? -HUGE_VAL : 0.0;
}

// The sum of term(k) over the row. Four running sums: they need not wait for each other, and short sums round less.
template <class V, class Term, class Reduce>
FASTMETA_ROW_FUNCTION V row_sum(int count, const Term& term, const Reduce& reduce) {
  V sum = splat<V>(0);
  int k = 0;
  if (count >= 8) {
    V sums[4] = {sum, sum, sum, sum};
    for (; k + 4 <= count; k += 4) {
      for (int i = 0; i < 4; ++i) sums[i] += term(k + i);
    }
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  for (; k < count; ++k) sum += term(k);
  return reduce.sum(sum);
}

// <a, b> of the row.
template <class V, class Reduce>
FASTMETA_ROW_FUNCTION V dot(int count, const V* a, const V* b, const Reduce& reduce) {
  return row_sum<V>(count, [&](int k) FASTMETA_TERM { return a[k] * b[k]; }, reduce);
}

// p = softmax(f). A row with NaN, +inf or nothing but -inf becomes NaN. p may be f.
template <class V, class Reduce>
FASTMETA_ROW_FUNCTION void softmax(int count, const V* f, V* p, const Reduce& reduce) {
  V top = f[0];
  for (int k = 1; k < count; ++k) top = larger(top, f[k]);
  top = reduce.max(top);
  for (int k = 0; k < count; ++k) p[k] = exp_nonpositive(f[k] - top);
  const V inverse = splat<V>(1) / row_sum<V>(count, [&](int k) FASTMETA_TERM { return p[k]; }, reduce);
  for (int k = 0; k < count; ++k) p[k] *= inverse;
}

// out = J u = p (u - <p, u>). out may be u.
template <class V, class Reduce>
FASTMETA_ROW_FUNCTION void softmax_jacobian(int count, const V* p, const V* u, V* out, const Reduce& reduce) {
  const V mean = dot(count, p, u, reduce);
  for (int k = 0; k < count; ++k) out[k] = p[k] * (u[k] - mean);
}

// exp(-|f|), from which the sigmoid and its derivative follow without overflow.
template <class V>
FASTMETA_ROW_FUNCTION V exp_minus_abs(V f) {
  return exp_nonpositive(-larger(f, -f));
}

template <class V>
FASTMETA_ROW_FUNCTION V sigmoid(V f) {
  const V one = splat<V>(1), e = exp_minus_abs(f);
  return (f < splat<V>(0) ? e : one) / (one + e);
}

// r = dl/df. r may be neither f nor y.
template <Loss loss, class V, class Reduce>
FASTMETA_ROW_FUNCTION void residual(int count, const V* f, const V* y, V* r, const Reduce& reduce) {
  const V two = splat<V>(2);
  if constexpr (loss == Loss::cross_entropy) {  // s p - y, s = sum(y)
    const V total = row_sum<V>(count, [&](int k) FASTMETA_TERM { return y[k]; }, reduce);
    softmax(count, f, r, reduce);
    for (int k = 0; k < count; ++k) r[k] = total * r[k] - y[k];
  } else if constexpr (loss == Loss::binary_cross_entropy) {  // sigmoid(f) - y
    for (int k = 0; k < count; ++k) r[k] = sigmoid(f[k]) - y[k];
  } else if constexpr (loss == Loss::mse) {  // 2 (f - y)
    for (int k = 0; k < count; ++k) r[k] = two * (f[k] - y[k]);
  } else {  // 2 J (p - y)
    softmax(count, f, r, reduce);
    const V mean = row_sum<V>(count, [&](int k) FASTMETA_TERM { return r[k] * (r[k] - y[k]); }, reduce);
    for (int k = 0; k < count; ++k) r[k] = two * r[k] * (r[k] - y[k] - mean);
  }
}

// t = D_z(-dl/dy). t may be neither f nor z.
template <Loss loss, class V, class Reduce>
FASTMETA_ROW_FUNCTION void label_tangent(int count, const V* f, const V* z, V* t, const Reduce& reduce) {
  const V two = splat<V>(2);
  if constexpr (loss == Loss::cross_entropy) {  // z - <p, z>
    softmax(count, f, t, reduce);
    const V mean = dot(count, t, z, reduce);
    for (int k = 0; k < count; ++k) t[k] = z[k] - mean;
  } else if constexpr (loss == Loss::binary_cross_entropy) {  // z
    for (int k = 0; k < count; ++k) t[k] = z[k];
  } else if constexpr (loss == Loss::mse) {  // 2 z
    for (int k = 0; k < count; ++k) t[k] = two * z[k];
  } else {  // 2 J z
    softmax(count, f, t, reduce);
    softmax_jacobian(count, t, z, t, reduce);
    for (int k = 0; k < count; ++k) t[k] *= two;
  }
}

// c = (d2l/df2) z for targets that sum to one; Gauss-Newton for mse_probs. Overwrites z; c may be neither f nor z.
template <Loss loss, class V, class Reduce>
FASTMETA_ROW_FUNCTION void curvature(int count, const V* f, V* z, V* c, const Reduce& reduce) {
  const V two = splat<V>(2);
  if constexpr (loss == Loss::cross_entropy) {  // J z
    softmax(count, f, c, reduce);
    softmax_jacobian(count, c, z, c, reduce);
  } else if constexpr (loss == Loss::binary_cross_entropy) {  // sigma (1 - sigma) z
    const V one = splat<V>(1);
    for (int k = 0; k < count; ++k) {
      const V e = exp_minus_abs(f[k]), inverse = one / (one + e);
      c[k] = e * inverse * inverse * z[k];
    }
  } else if constexpr (loss == Loss::mse) {  // 2 z
    for (int k = 0; k < count; ++k) c[k] = two * z[k];
  } else {  // 2 J (J z)
    softmax(count, f, c, reduce);
    softmax_jacobian(count, c, z, z, reduce);
    softmax_jacobian(count, c, z, c, reduce);
    for (int k = 0; k < count; ++k) c[k] *= two;
  }
}

}  // namespace fastmeta::FASTMETA_TARGET
