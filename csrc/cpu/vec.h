// SIMD vectors of float and double in the compiler's own vector type. Included once for each instruction set
// (kernels.h), in its own namespace and with its target switched on.
namespace fastmeta::FASTMETA_TARGET {

#define FASTMETA_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  typedef float Value __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FASTMETA_VECTOR_BYTES), aligned(4), may_alias));
  using Index = int32_t;
  typedef Index Int __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
};

template <>
struct VectorTypes<double> {
  typedef double Value __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FASTMETA_VECTOR_BYTES), aligned(8), may_alias));
  using Index = int64_t;
  typedef Index Int __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
};

template <class A>
using Vec = typename VectorTypes<A>::Value;
using VecF = Vec<float>;
using VecD = Vec<double>;

template <class A>
constexpr int lanes = FASTMETA_VECTOR_BYTES / static_cast<int>(sizeof(A));

template <class V>
FASTMETA_INLINE V splat(double x) {
  using A = std::remove_cvref_t<decltype(V{}[0])>;
  return V{} + static_cast<A>(x);
}

template <class A>
FASTMETA_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorTypes<A>::Unaligned*>(p);
}

template <class A>
FASTMETA_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VectorTypes<A>::Unaligned*>(p) = v;
}

// Lane i gets lane i ^ step.
template <int step, class A, size_t... i>
FASTMETA_INLINE Vec<A> exchange(Vec<A> v, std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, static_cast<int>(i ^ step)...);
#else
  return __builtin_shuffle(v, typename VectorTypes<A>::Int{static_cast<typename VectorTypes<A>::Index>(i ^ step)...});
#endif
}

// Sum and maximum over the lanes, in every lane.
template <class A>
struct LaneReduce {
  template <int step = 1>
  static FASTMETA_INLINE Vec<A> sum(Vec<A> v) {
    if constexpr (step >= lanes<A>) {
      return v;
    } else {
      return sum<2 * step>(v + exchange<step, A>(v, std::make_index_sequence<lanes<A>>()));
    }
  }
  template <int step = 1>
  static FASTMETA_INLINE Vec<A> max(Vec<A> v) {
    if constexpr (step >= lanes<A>) {
      return v;
    } else {
      const Vec<A> other = exchange<step, A>(v, std::make_index_sequence<lanes<A>>());
      return max<2 * step>(v > other ? v : other);
    }
  }
};

// All ones in lanes [0, count), zeros elsewhere.
template <class A>
FASTMETA_INLINE typename VectorTypes<A>::Int first_lanes(int64_t count) {
  typename VectorTypes<A>::Int index{};
  for (int i = 0; i < lanes<A>; ++i) index[i] = i;
  return index < static_cast<typename VectorTypes<A>::Index>(count);
}

template <class A>
struct ExpRange;
// Terms of the Taylor series on |r| <= ln(2)/2 (remainder 5e-9 and 4e-18), where exp() leaves the normal numbers, the
// constant that rounds to an integer when added, ln(2) in two parts, and the width and bits of the exponent.
template <>
struct ExpRange<float> {
  static constexpr int terms = 7, mantissa = 23;
  static constexpr float lowest = -87.3f, rounder = 12582912.0f, ln2_high = 0.693359375f,
                         ln2_low = -2.12194440054691e-4f;
  static constexpr uint32_t one = 0x3f800000u;
};
template <>
struct ExpRange<double> {
  static constexpr int terms = 13, mantissa = 52;
  static constexpr double lowest = -708.3, rounder = 6755399441055744.0, ln2_high = 0x1.62e42fefa3000p-1,
                          ln2_low = 0x1.3de6af278ece6p-42;
  static constexpr uint64_t one = 0x3ff0000000000000u;
};

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

// exp(r) for small r, 1 + r (1 + r/2 (1 + ...)) with the coefficients 1/n! written out.
template <class A, int n = 0>
FASTMETA_INLINE Vec<A> exp_series(Vec<A> r) {
  constexpr A coefficient = static_cast<A>(1.0 / factorial(n));
  if constexpr (n == ExpRange<A>::terms) {
    return splat<Vec<A>>(coefficient);
  } else {
    return exp_series<A, n + 1>(r) * r + coefficient;
  }
}

// exp(x) for x <= 0 within 2 ulp, 0 where the result would not be a normal number; NaN stays NaN.
template <class A>
FASTMETA_INLINE Vec<A> exp_of(Vec<A> x) {
  using Range = ExpRange<A>;
  using Bits = typename VectorTypes<A>::Bits;
  const Vec<A> low = splat<Vec<A>>(Range::lowest);
  const Vec<A> clamped = x < low ? low : x;
  // x = n ln(2) + r; the sum's low bits hold n.
  const Vec<A> sum = clamped * static_cast<A>(1.4426950408889634) + Range::rounder;
  const Vec<A> n = sum - Range::rounder;
  const Vec<A> r = (clamped - n * Range::ln2_high) - n * Range::ln2_low;
  const Bits power = (reinterpret_cast<Bits>(sum) << Range::mantissa) + Range::one;
  const Vec<A> result = exp_series<A>(r) * reinterpret_cast<Vec<A>>(power);
  return x < low ? splat<Vec<A>>(0) : result;
}

FASTMETA_INLINE VecF exp_nonpositive(VecF x) { return exp_of<float>(x); }
FASTMETA_INLINE VecD exp_nonpositive(VecD x) { return exp_of<double>(x); }

}  // namespace fastmeta::FASTMETA_TARGET
