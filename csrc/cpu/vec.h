// SIMD vectors of float and double in the compiler's own vector type, and how elements of every type become them.
// Included once for each instruction set (targets.h), after convert.h.
namespace fastmeta::FASTMETA_TARGET {

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

// Loads and stores of float32, bfloat16, float16 and float64 as vectors of the accumulation type, whole or in part.

#define FASTMETA_AVX512 (FASTMETA_X86 && FASTMETA_VECTOR_BYTES == 64)
#define FASTMETA_AVX2 (FASTMETA_X86 && FASTMETA_VECTOR_BYTES == 32)

typedef uint16_t Bits16 __attribute__((vector_size(FASTMETA_VECTOR_BYTES / 2)));
typedef uint16_t Bits16Unaligned __attribute__((vector_size(FASTMETA_VECTOR_BYTES / 2), aligned(2), may_alias));
using Bits32 = VectorTypes<float>::Bits;

FASTMETA_INLINE VecF widen(Bits16 v, Bfloat16) { return floats_of_bfloat16<VecF>(__builtin_convertvector(v, Bits32)); }

FASTMETA_INLINE Bits16 round_to(VecF v, Bfloat16) { return __builtin_convertvector(bfloat16_bits<Bits32>(v), Bits16); }

FASTMETA_INLINE VecF widen(Bits16 v, Float16) {
#if FASTMETA_AVX512
  return reinterpret_cast<VecF>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(v)));
#elif FASTMETA_AVX2
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v)));
#else
  VecF wide{};
  for (int i = 0; i < lanes<float>; ++i) wide[i] = widen(Float16{v[i]});
  return wide;
#endif
}

FASTMETA_INLINE Bits16 round_to(VecF v, Float16) {
#if FASTMETA_AVX512
  return reinterpret_cast<Bits16>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif FASTMETA_AVX2
  return reinterpret_cast<Bits16>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  Bits16 bits{};
  for (int i = 0; i < lanes<float>; ++i) bits[i] = round_to<Float16>(v[i]).bits;
  return bits;
#endif
}

// Loads `count` lanes, the others are 0; reads no memory beyond them.
template <class A>
FASTMETA_INLINE Vec<A> load_first(const A* p, int64_t count) {
#if FASTMETA_AVX512
  if constexpr (sizeof(A) == 4) {
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
  } else {
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p));
  }
#elif FASTMETA_AVX2
  const __m256i mask = reinterpret_cast<__m256i>(first_lanes<A>(count));
  if constexpr (sizeof(A) == 4) {
    return reinterpret_cast<Vec<A>>(_mm256_maskload_ps(p, mask));
  } else {
    return reinterpret_cast<Vec<A>>(_mm256_maskload_pd(p, mask));
  }
#else
  Vec<A> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

template <class A>
FASTMETA_INLINE void store_first(A* p, Vec<A> v, int64_t count) {
#if FASTMETA_AVX512
  if constexpr (sizeof(A) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), reinterpret_cast<__m512d>(v));
  }
#elif FASTMETA_AVX2
  const __m256i mask = reinterpret_cast<__m256i>(first_lanes<A>(count));
  if constexpr (sizeof(A) == 4) {
    _mm256_maskstore_ps(p, mask, reinterpret_cast<__m256>(v));
  } else {
    _mm256_maskstore_pd(p, mask, reinterpret_cast<__m256d>(v));
  }
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

FASTMETA_INLINE Bits16 load_first_bits(const uint16_t* p, int64_t count) {
#if FASTMETA_AVX512
  return reinterpret_cast<Bits16>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
#else
  Bits16 v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

FASTMETA_INLINE void store_first_bits(uint16_t* p, Bits16 v, int64_t count) {
#if FASTMETA_AVX512
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m256i>(v));
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// dst [n rounded up to vectors] = src [n] of type T, the lanes beyond n set to `padding`.
template <class A, class T>
FASTMETA_INLINE void load_row_of(const T* src, int64_t n, double padding, A* dst) {
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) {
    if constexpr (std::is_same_v<A, T>) {
      store<A>(dst + i, load<A>(src + i));
    } else {
      store<A>(dst + i, widen(*reinterpret_cast<const Bits16Unaligned*>(src + i), T{}));
    }
  }
  if (i < n) {
    Vec<A> tail;
    if constexpr (std::is_same_v<A, T>) {
      tail = load_first<A>(src + i, n - i);
    } else {
      tail = widen(load_first_bits(&src[i].bits, n - i), T{});
    }
    store<A>(dst + i, first_lanes<A>(n - i) ? tail : splat<Vec<A>>(padding));
  }
}

template <class A, class T>
FASTMETA_INLINE void store_row_of(const A* src, int64_t n, A scale, T* dst) {
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) {
    if constexpr (std::is_same_v<A, T>) {
      store<A>(dst + i, load<A>(src + i) * scale);
    } else {
      *reinterpret_cast<Bits16Unaligned*>(dst + i) = round_to(load<A>(src + i) * scale, T{});
    }
  }
  if (i < n) {
    if constexpr (std::is_same_v<A, T>) {
      store_first<A>(dst + i, load<A>(src + i) * scale, n - i);
    } else {
      store_first_bits(&dst[i].bits, round_to(load<A>(src + i) * scale, T{}), n - i);
    }
  }
}

// dst [n rounded up to vectors] = row `row` of the matrix, [n], the lanes beyond n set to `padding`.
template <class A>
FASTMETA_INLINE void load_row(const Matrix& matrix, int64_t row, int64_t n, double padding, A* dst) {
  const int64_t start = row * matrix.stride;
  if constexpr (std::is_same_v<A, double>) {
    load_row_of<A>(static_cast<const double*>(matrix.data) + start, n, padding, dst);
  } else if (matrix.element == Element::float32) {
    load_row_of<A>(static_cast<const float*>(matrix.data) + start, n, padding, dst);
  } else if (matrix.element == Element::bfloat16) {
    load_row_of<A>(static_cast<const Bfloat16*>(matrix.data) + start, n, padding, dst);
  } else {
    load_row_of<A>(static_cast<const Float16*>(matrix.data) + start, n, padding, dst);
  }
}

// Row `row` of the matrix, [n] = scale * src [n].
template <class A>
FASTMETA_INLINE void store_row(const A* src, int64_t n, A scale, const Matrix& matrix, int64_t row) {
  const int64_t start = row * matrix.stride;
  if constexpr (std::is_same_v<A, double>) {
    store_row_of<A>(src, n, scale, static_cast<double*>(matrix.data) + start);
  } else if (matrix.element == Element::float32) {
    store_row_of<A>(src, n, scale, static_cast<float*>(matrix.data) + start);
  } else if (matrix.element == Element::bfloat16) {
    store_row_of<A>(src, n, scale, static_cast<Bfloat16*>(matrix.data) + start);
  } else {
    store_row_of<A>(src, n, scale, static_cast<Float16*>(matrix.data) + start);
  }
}

// Elements [first, first + n) of a vector [N] with n <= lanes, to dst [lanes]. Those beyond n are not defined.
template <class A>
FASTMETA_INLINE void load_elements(const Matrix& vector, int64_t first, int64_t n, A* dst) {
  if (vector.stride == 1) return load_row<A>(vector, first, n, 0.0, dst);
  alignas(64) A element[lanes<A>];
  for (int64_t i = 0; i < n; ++i) {
    load_row<A>(vector, first + i, 1, 0.0, element);
    dst[i] = element[0];
  }
}

}  // namespace fastmeta::FASTMETA_TARGET
