// Loads and stores of float32, bfloat16, float16 and float64 as vectors of the accumulation type, whole or in part.
// Included once for each instruction set (kernels.h).
namespace fastmeta::FASTMETA_TARGET {

#define FASTMETA_AVX512 (FASTMETA_X86 && FASTMETA_VECTOR_BYTES == 64)
#define FASTMETA_AVX2 (FASTMETA_X86 && FASTMETA_VECTOR_BYTES == 32)

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t Bits16 __attribute__((vector_size(FASTMETA_VECTOR_BYTES / 2)));
typedef uint16_t Bits16Unaligned __attribute__((vector_size(FASTMETA_VECTOR_BYTES / 2), aligned(2), may_alias));
using Bits32 = VectorTypes<float>::Bits;

FASTMETA_INLINE VecF widen(Bits16 v, BFloat16) {
  return reinterpret_cast<VecF>(__builtin_convertvector(v, Bits32) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
FASTMETA_INLINE Bits16 narrow(VecF v, BFloat16) {
  const Bits32 bits = reinterpret_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 nan = Bits32{} + 0x7fc0u;
  return __builtin_convertvector(v == v ? rounded : nan, Bits16);
}

FASTMETA_INLINE VecF widen(Bits16 v, Float16) {
#if FASTMETA_AVX512
  return reinterpret_cast<VecF>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(v)));
#elif FASTMETA_AVX2
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v)));
#else
  VecF wide{};
  for (int i = 0; i < lanes<float>; ++i) wide[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(v[i]);
  return wide;
#endif
}

FASTMETA_INLINE Bits16 narrow(VecF v, Float16) {
#if FASTMETA_AVX512
  return reinterpret_cast<Bits16>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif FASTMETA_AVX2
  return reinterpret_cast<Bits16>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  Bits16 narrow{};
  for (int i = 0; i < lanes<float>; ++i) narrow[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[i]);
  return narrow;
#endif
}

// The first `count` lanes, the others 0; reads no further.
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
      *reinterpret_cast<Bits16Unaligned*>(dst + i) = narrow(load<A>(src + i) * scale, T{});
    }
  }
  if (i < n) {
    if constexpr (std::is_same_v<A, T>) {
      store_first<A>(dst + i, load<A>(src + i) * scale, n - i);
    } else {
      store_first_bits(&dst[i].bits, narrow(load<A>(src + i) * scale, T{}), n - i);
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
    load_row_of<A>(static_cast<const BFloat16*>(matrix.data) + start, n, padding, dst);
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
    store_row_of<A>(src, n, scale, static_cast<BFloat16*>(matrix.data) + start);
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
