// The two small matrix products of a block of rows: features times a packed factor, and rows^T times features.
// Included once for each instruction set (kernels.cpp).
namespace fastmeta::FASTMETA_TARGET {

// 32 vector registers hold 16 accumulators and their operands, 16 registers hold 8.
constexpr bool many_registers = FASTMETA_AVX512 || !FASTMETA_X86;
constexpr int most_columns = many_registers ? 4 : 2;  // vectors in a panel of a factor
constexpr int depth = 32;                             // features summed in one go: short sums round less

// out [R, K vectors] = h [R, features] panel [features, K vectors]
template <class A, int R, int K>
FASTMETA_INLINE void multiply_tile(const A* h, int64_t h_stride, const A* panel, int64_t features, A* out,
                                   int64_t padded) {
  Vec<A> total[R][K] = {};
  for (int64_t first = 0; first < features; first += depth) {
    const int64_t last = first + depth < features ? first + depth : features;
    Vec<A> sum[R][K] = {};
    for (int64_t d = first; d < last; ++d) {
      Vec<A> column[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) column[k] = load<A>(panel + (d * K + k) * lanes<A>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) sum[r][k] += column[k] * h[r * h_stride + d];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) total[r][k] += sum[r][k];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < K; ++k) store<A>(out + r * padded + k * lanes<A>, total[r][k]);
  }
}

template <class A, int R, int K>
void multiply_rows(const A* h, int64_t h_stride, const A* panel, int64_t features, int64_t rows, A* out,
                   int64_t padded) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    multiply_tile<A, R, K>(h + r * h_stride, h_stride, panel, features, out + r * padded, padded);
  }
  if constexpr (R > 1) {
    if (r < rows) {
      multiply_rows<A, R / 2, K>(h + r * h_stride, h_stride, panel, features, rows - r, out + r * padded, padded);
    }
  }
}

// Vectors in the panel that starts at vector k of `vectors`.
constexpr int64_t panel_vectors(int64_t k, int64_t vectors) {
  return vectors - k < most_columns ? vectors - k : most_columns;
}

// out [rows, padded] = h [rows, features] factor, the factor packed in panels [features, up to `most_columns` vectors].
template <class A>
void multiply(const A* h, int64_t h_stride, const A* factor, int64_t features, int64_t rows, A* out, int64_t padded) {
  const int64_t vectors = padded / lanes<A>;
  for (int64_t k = 0; k < vectors; k += most_columns) {
    const A* panel = factor + k * lanes<A> * features;
    A* target = out + k * lanes<A>;
    const int64_t width = panel_vectors(k, vectors);
    if (width == 1) {
      multiply_rows<A, 8, 1>(h, h_stride, panel, features, rows, target, padded);
    } else if (width == 2) {
      multiply_rows<A, many_registers ? 8 : 4, 2>(h, h_stride, panel, features, rows, target, padded);
    } else if constexpr (most_columns == 4) {
      if (width == 3) {
        multiply_rows<A, 4, 3>(h, h_stride, panel, features, rows, target, padded);
      } else {
        multiply_rows<A, 4, 4>(h, h_stride, panel, features, rows, target, padded);
      }
    }
  }
}

// Rows [n, C] as they lie in memory.
template <class A>
struct ByRows {
  const A* data;
  int64_t padded;

  FASTMETA_INLINE const A* at(int64_t row, int64_t column) const { return data + row * padded + column; }
  static constexpr int64_t next_column = 1;
};

// The same rows as columns [C][lanes], one block for every `lanes` rows.
template <class A>
struct ByColumns {
  const A* data;
  int64_t outputs;

  FASTMETA_INLINE const A* at(int64_t row, int64_t column) const {
    return data + (row / lanes<A> * outputs + column) * lanes<A> + row % lanes<A>;
  }
  static constexpr int64_t next_column = lanes<A>;
};

// gradient [C vectors of K * lanes features] += rows [n, C]^T h [n, K * lanes features]
template <class A, int C, int K, class Rows>
FASTMETA_INLINE void accumulate_tile(const Rows& rows, int64_t first, const A* h, int64_t h_stride, int64_t n,
                                     A* gradient, int64_t gradient_stride) {
  Vec<A> sum[C][K] = {};
  for (int64_t r = 0; r < n; ++r) {
    Vec<A> feature[K];
    const A* row = rows.at(r, first);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) feature[k] = load<A>(h + r * h_stride + k * lanes<A>);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) sum[c][k] += feature[k] * row[c * Rows::next_column];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      A* place = gradient + c * gradient_stride + k * lanes<A>;
      store<A>(place, load<A>(place) + sum[c][k]);
    }
  }
}

// How many of the remaining outputs a tile takes: at most five; six to nine are halved rather than five and a rest.
constexpr int tile_width(int64_t left) { return static_cast<int>(left <= 5 ? left : left < 10 ? (left + 1) / 2 : 5); }

// gradient [C, K vectors of features] += rows [n, C]^T h [n, K vectors of features]
template <class A, int K, class Rows>
void accumulate_vectors(const Rows& rows, int64_t outputs, const A* h, int64_t h_stride, int64_t n, A* gradient,
                        int64_t gradient_stride) {
  for (int64_t c = 0, width; c < outputs; c += width) {
    width = tile_width(outputs - c);
    A* place = gradient + c * gradient_stride;
    if (width == 1) accumulate_tile<A, 1, K>(rows, c, h, h_stride, n, place, gradient_stride);
    if (width == 2) accumulate_tile<A, 2, K>(rows, c, h, h_stride, n, place, gradient_stride);
    if (width == 3) accumulate_tile<A, 3, K>(rows, c, h, h_stride, n, place, gradient_stride);
    if (width == 4) accumulate_tile<A, 4, K>(rows, c, h, h_stride, n, place, gradient_stride);
    if (width == 5) accumulate_tile<A, 5, K>(rows, c, h, h_stride, n, place, gradient_stride);
  }
}

// gradient [C, padded_features] += rows [n, C]^T h [n, padded_features]
template <class A, class Rows>
void accumulate(const Rows& rows, int64_t outputs, const A* h, int64_t h_stride, int64_t n, A* gradient,
                int64_t padded_features) {
  constexpr int wide = many_registers ? 4 : 2;
  int64_t d = 0;
  for (; d + wide * lanes<A> <= padded_features; d += wide * lanes<A>) {
    accumulate_vectors<A, wide>(rows, outputs, h + d, h_stride, n, gradient + d, padded_features);
  }
  for (; d < padded_features; d += lanes<A>) {
    accumulate_vectors<A, 1>(rows, outputs, h + d, h_stride, n, gradient + d, padded_features);
  }
}

}  // namespace fastmeta::FASTMETA_TARGET
