// The losses: three row functions each, the only per-loss code of every kernel, on the CPU and on the GPU, beside the
// table of loss.h. fastmeta/losses.py holds the same functions in PyTorch, with the table of formulas.
//
// A value V is a scalar or a SIMD vector. A row is `count` values; a thread of a GPU may hold only a part of it, and
// `reduce.sum(V)` and `reduce.max(V)` combine what the lanes of V, or the threads, hold of the same row. Lanes beyond
// the row's C entries hold padding_logit(loss) in f and 0 in y and z, and then count for nothing. Targets y are read
// where reads_targets() says so (loss.h).
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

// tanh(f). 1 - exp(-2 |f|) cancels for small f, and there it is f / (1 + f^2 / (3 + f^2 / (5 + ...))), the continued
// fraction down to 13: 2e-16 from tanh at |f| = 0.5.
template <class V>
FASTMETA_ROW_FUNCTION V tanh_of(V f) {
  const V one = splat<V>(1), size = larger(f, -f), square = f * f, e = exp_nonpositive(splat<V>(-2) * size);
  const V top = f * (((square + splat<V>(378)) * square + splat<V>(17325)) * square + splat<V>(135135));
  const V bottom = ((splat<V>(28) * square + splat<V>(3150)) * square + splat<V>(62370)) * square + splat<V>(135135);
  const V difference = f < splat<V>(0) ? e - one : one - e;
  const auto is_small = size < splat<V>(0.5);
  return (is_small ? top : difference) / (is_small ? bottom : one + e);
}

// 1 - tanh(f)^2
template <class V>
FASTMETA_ROW_FUNCTION V tanh_slope(V f) {
  const V t = tanh_of(f);
  return splat<V>(1) - t * t;
}

// huber's first and second derivative at a difference f - y; NaN where the difference is.
template <class V>
FASTMETA_ROW_FUNCTION V huber_residual(V gap) {
  const V one = splat<V>(1);
  return gap > one ? one : gap < -one ? -one : gap;
}

template <class V>
FASTMETA_ROW_FUNCTION V huber_slope(V gap) {
  const V r = huber_residual(gap);
  return gap == r ? splat<V>(1) : r - r;
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
  } else if constexpr (loss == Loss::mse_tanh) {  // 2 (t - u) (1 - t^2), t = tanh(f), u = tanh(y)
    for (int k = 0; k < count; ++k) {
      const V t = tanh_of(f[k]);
      r[k] = two * (t - tanh_of(y[k])) * (splat<V>(1) - t * t);
    }
  } else if constexpr (loss == Loss::huber) {  // clamp(f - y, -1, 1)
    for (int k = 0; k < count; ++k) r[k] = huber_residual(f[k] - y[k]);
  } else {  // 2 J (p - y)
    static_assert(loss == Loss::mse_probs, "a loss without this row function");
    softmax(count, f, r, reduce);
    const V mean = row_sum<V>(count, [&](int k) FASTMETA_TERM { return r[k] * (r[k] - y[k]); }, reduce);
    for (int k = 0; k < count; ++k) r[k] = two * r[k] * (r[k] - y[k] - mean);
  }
}

// t = D_z(-dl/dy). t may be none of f, y and z.
template <Loss loss, class V, class Reduce>
FASTMETA_ROW_FUNCTION void label_tangent(int count, const V* f, const V* y, const V* z, V* t, const Reduce& reduce) {
  const V two = splat<V>(2);
  if constexpr (loss == Loss::cross_entropy) {  // z - <p, z>
    softmax(count, f, t, reduce);
    const V mean = dot(count, t, z, reduce);
    for (int k = 0; k < count; ++k) t[k] = z[k] - mean;
  } else if constexpr (loss == Loss::binary_cross_entropy) {  // z
    for (int k = 0; k < count; ++k) t[k] = z[k];
  } else if constexpr (loss == Loss::mse) {  // 2 z
    for (int k = 0; k < count; ++k) t[k] = two * z[k];
  } else if constexpr (loss == Loss::mse_tanh) {  // 2 (1 - tanh(y)^2) (1 - tanh(f)^2) z
    for (int k = 0; k < count; ++k) t[k] = two * tanh_slope(y[k]) * tanh_slope(f[k]) * z[k];
  } else if constexpr (loss == Loss::huber) {  // 1[|f - y| <= 1] z
    for (int k = 0; k < count; ++k) t[k] = huber_slope(f[k] - y[k]) * z[k];
  } else {  // 2 J z
    static_assert(loss == Loss::mse_probs, "a loss without this row function");
    softmax(count, f, t, reduce);
    softmax_jacobian(count, t, z, t, reduce);
    for (int k = 0; k < count; ++k) t[k] *= two;
  }
}

// c = (d2l/df2) z for targets that sum to one; Gauss-Newton for mse_probs and mse_tanh. Overwrites z; c may be none of
// f, y and z.
template <Loss loss, class V, class Reduce>
FASTMETA_ROW_FUNCTION void curvature(int count, const V* f, const V* y, V* z, V* c, const Reduce& reduce) {
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
  } else if constexpr (loss == Loss::mse_tanh) {  // 2 (1 - tanh(f)^2)^2 z
    for (int k = 0; k < count; ++k) {
      const V slope = tanh_slope(f[k]);
      c[k] = two * slope * slope * z[k];
    }
  } else if constexpr (loss == Loss::huber) {  // 1[|f - y| <= 1] z
    for (int k = 0; k < count; ++k) c[k] = huber_slope(f[k] - y[k]) * z[k];
  } else {  // 2 J (J z)
    static_assert(loss == Loss::mse_probs, "a loss without this row function");
    softmax(count, f, c, reduce);
    softmax_jacobian(count, c, z, z, reduce);
    softmax_jacobian(count, c, z, c, reduce);
    for (int k = 0; k < count; ++k) c[k] *= two;
  }
}

template <Loss loss, class V, class Reduce>
FASTMETA_ROW_FUNCTION void row_function(RowFunction function, int count, const V* f, const V* y, V* z, V* out,
                                        const Reduce& reduce) {
  if (function == RowFunction::residual) {
    residual<loss>(count, f, y, out, reduce);
  } else if (function == RowFunction::label_tangent) {
    label_tangent<loss>(count, f, y, z, out, reduce);
  } else {
    curvature<loss>(count, f, y, z, out, reduce);
  }
}

// The row function of a loss that is known at run time. May overwrite z; out may be none of f, y and z.
template <class V, class Reduce>
FASTMETA_ROW_FUNCTION void row_function(Loss loss, RowFunction function, int count, const V* f, const V* y, V* z,
                                        V* out, const Reduce& reduce) {
  if (function == RowFunction::tangent) {
    for (int k = 0; k < count; ++k) out[k] = z[k];
    return;
  }
  switch (loss) {
#define FASTMETA_CASE(name, ...) \
  case Loss::name:               \
    return row_function<Loss::name>(function, count, f, y, z, out, reduce);
    FASTMETA_LOSSES(FASTMETA_CASE)
#undef FASTMETA_CASE
  }
}

}  // namespace fastmeta::FASTMETA_TARGET
