// The row engine for few outputs: the lanes of a vector are rows, an output is a vector. Nothing is padded, softmax and
// dot products need no sums over lanes, and a weight [C, D] is read as it lies in memory.
// Included once for each instruction set (kernels.cpp).
namespace fastmeta::FASTMETA_TARGET {

constexpr int most_rows = 32;    // of a block, whose results are multiplied by its features at once
constexpr int depth_steps = 32;  // vectors of features summed in one go: short sums round less

// `reduce` of losses.h: a lane holds all of its row.
template <class A>
struct NoReduce {
  static FASTMETA_INLINE Vec<A> sum(Vec<A> v) { return v; }
  static FASTMETA_INLINE Vec<A> max(Vec<A> v) { return v; }
};

template <class A>
constexpr int log_lanes = lanes<A> == 16  ? 4
                          : lanes<A> == 8 ? 3
                          : lanes<A> == 4 ? 2
                                          : 1;

// The lane of (u, v) that lane i comes from in step `step` of a transposition. Steps within 128 bits are the unpack
// instructions of x86.
template <class A, int step, bool upper>
constexpr int source_lane(int i) {
  const int from_v = (i >> step & 1) * lanes<A>;
  if (sizeof(A) == 4 && step == 0) return from_v + ((i & ~3) | (i >> 1 & 1) | (upper ? 2 : 0));
  return from_v + ((i & ~(1 << step)) | (upper ? 1 << step : 0));
}

template <class A, int step, bool upper, size_t... i>
FASTMETA_INLINE Vec<A> interleave(Vec<A> u, Vec<A> v, std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(u, v, source_lane<A, step, upper>(i)...);
#else
  using Index = typename VectorTypes<A>::Index;
  return __builtin_shuffle(
      u, v, typename VectorTypes<A>::Int{static_cast<Index>(source_lane<A, step, upper>(static_cast<int>(i)))...});
#endif
}

template <class A, int step, bool upper>
FASTMETA_INLINE Vec<A> interleave(Vec<A> u, Vec<A> v) {
  return interleave<A, step, upper>(u, v, std::make_index_sequence<lanes<A>>());
}

// Of 2^steps vectors: lane r of the result is the sum over the lanes of vector r.
template <class A, int steps = log_lanes<A>>
FASTMETA_INLINE Vec<A> sums_of(const A* vectors) {
  if constexpr (steps == 0) {
    return load<A>(vectors);
  } else {
    const Vec<A> u = sums_of<A, steps - 1>(vectors);
    const Vec<A> v = sums_of<A, steps - 1>(vectors + (lanes<A> << (steps - 1)));
    return interleave<A, steps - 1, false>(u, v) + interleave<A, steps - 1, true>(u, v);
  }
}

template <class A, int step = 0>
FASTMETA_INLINE void transpose(Vec<A> (&v)[lanes<A>]) {
  if constexpr (step < log_lanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<A>; ++i) {
      if (i >> step & 1) continue;
      const Vec<A> u = v[i], w = v[i + (1 << step)];
      v[i] = interleave<A, step, false>(u, w);
      v[i + (1 << step)] = interleave<A, step, true>(u, w);
    }
    transpose<A, step + 1>(v);
  }
}

// The column of the input that transpose() leaves in vector i.
template <class A>
constexpr int transposed_place(int i) {
  return sizeof(A) == 4 ? ((i & ~3) | (i & 1) << 1 | (i >> 1 & 1)) : i;
}

template <class A>
FASTMETA_INLINE void store_transposed(Vec<A> (&v)[lanes<A>], int first, int outputs, A* out) {
  transpose<A>(v);
  for (int i = 0; i < lanes<A>; ++i) {
    const int column = first + transposed_place<A>(i);
    if (column < outputs) store<A>(out + column * lanes<A>, v[i]);
  }
}

// out [C][lanes] = rows [first, first + n) of a matrix [N, C]; lanes beyond n are 0.
template <class A>
void columns_of(const Matrix& matrix, int64_t first, int n, int outputs, A* out) {
  if (matrix.element == (sizeof(A) == 8 ? Element::float64 : Element::float32)) {
    const A* data = static_cast<const A*>(matrix.data) + first * matrix.stride;
    for (int c = 0; c < outputs; c += lanes<A>) {
      Vec<A> v[lanes<A>];
      const int count = outputs - c;
      for (int r = 0; r < lanes<A>; ++r) {
        const A* row = data + r * matrix.stride + c;
        v[r] = r >= n ? Vec<A>{} : count >= lanes<A> ? load<A>(row) : load_first<A>(row, count);
      }
      store_transposed<A>(v, c, outputs, out);
    }
    return;
  }
  alignas(64) A rows[lanes<A>][few_outputs];
  for (int r = 0; r < n; ++r) load_row<A>(matrix, first + r, outputs, 0.0, rows[r]);
  for (int c = 0; c < outputs; c += lanes<A>) {
    Vec<A> v[lanes<A>];
    for (int r = 0; r < lanes<A>; ++r) v[r] = r < n ? load<A>(rows[r] + c) : Vec<A>{};
    store_transposed<A>(v, c, outputs, out);
  }
}

// Rows [first, first + n) of a matrix [N, C] = scale * columns [C][lanes].
template <class A>
void store_columns(const A* columns, int n, int outputs, A scale, const Matrix& matrix, int64_t first) {
  alignas(64) A rows[lanes<A>][few_outputs];
  for (int c = 0; c < outputs; c += lanes<A>) {
    Vec<A> v[lanes<A>];
    for (int i = 0; i < lanes<A>; ++i) v[i] = c + i < outputs ? load<A>(columns + (c + i) * lanes<A>) : Vec<A>{};
    transpose<A>(v);
    for (int i = 0; i < lanes<A>; ++i) store<A>(rows[transposed_place<A>(i)] + c, v[i]);
  }
  for (int r = 0; r < n; ++r) store_row<A>(rows[r], outputs, scale, matrix, first + r);
}

// Keeps the compiler from reading a value again for each of its uses.
template <class V>
FASTMETA_INLINE V in_register(V value) {
#if FASTMETA_X86
  asm("" : "+v"(value));
#endif
  return value;
}

// sum [R][C] += the products, lane by lane, of a vector of features of R rows of h with those of C rows of a weight.
template <class A, int R, int C, bool whole>
FASTMETA_INLINE void dot_step(const A* h, int64_t h_stride, const A* weight, int64_t weight_stride, int64_t count,
                              Vec<A> (&sum)[R][C]) {
  Vec<A> feature[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    feature[r] = whole ? load<A>(h + r * h_stride) : load_first<A>(h + r * h_stride, count);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const A* at = weight + c * weight_stride;
    const Vec<A> factor = in_register(whole ? load<A>(at) : load_first<A>(at, count));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r][c] += feature[r] * factor;
  }
}

// sums [C][lanes] vectors = (if `starts`) or += the products over `features`.
template <class A, int R, int C>
FASTMETA_INLINE void dot_tile(const A* h, int64_t h_stride, const A* weight, int64_t weight_stride, int64_t features,
                              bool starts, A* sums) {
  Vec<A> sum[R][C] = {};
  int64_t d = 0;
  for (; d + lanes<A> <= features; d += lanes<A>) {
    dot_step<A, R, C, true>(h + d, h_stride, weight + d, weight_stride, lanes<A>, sum);
  }
  if (d < features) dot_step<A, R, C, false>(h + d, h_stride, weight + d, weight_stride, features - d, sum);
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      A* place = sums + (c * lanes<A> + r) * lanes<A>;
      store<A>(place, starts ? sum[r][c] : load<A>(place) + sum[r][c]);
    }
  }
}

// All outputs of R rows at a time, then of the remaining rows: features that are read serve all outputs at once.
// `ahead` is the distance in elements to the features of the next call, which are prefetched; 0: none.
template <class A, int R>
void dot_rows(const A* h, int64_t h_stride, const A* weight, int64_t weight_stride, int64_t features, int64_t ahead,
              int n, int outputs, bool starts, A* sums) {
  int r = 0;
  for (; r + R <= n; r += R) {
    const A* from = h + r * h_stride;
    for (int i = 0; ahead != 0 && i < R; ++i) {
      const auto* next = reinterpret_cast<const char*>(from + i * h_stride + ahead);
      for (int64_t byte = 0; byte < features * static_cast<int64_t>(sizeof(A)); byte += 64) {
        __builtin_prefetch(next + byte);
      }
    }
    for (int c = 0, width; c < outputs; c += width) {
      width = tile_width(outputs - c);
      const A* factor = weight + c * weight_stride;
      A* place = sums + (c * lanes<A> + r) * lanes<A>;
      if (width == 1) dot_tile<A, R, 1>(from, h_stride, factor, weight_stride, features, starts, place);
      if (width == 2) dot_tile<A, R, 2>(from, h_stride, factor, weight_stride, features, starts, place);
      if (width == 3) dot_tile<A, R, 3>(from, h_stride, factor, weight_stride, features, starts, place);
      if (width == 4) dot_tile<A, R, 4>(from, h_stride, factor, weight_stride, features, starts, place);
      if (width == 5) dot_tile<A, R, 5>(from, h_stride, factor, weight_stride, features, starts, place);
    }
  }
  if constexpr (R > 1) {
    if (r < n) {
      dot_rows<A, R / 2>(h + r * h_stride, h_stride, weight, weight_stride, features, ahead, n - r, outputs, starts,
                         sums + r * lanes<A>);
    }
  }
}

// out [C][lanes] = h [n, features] weight^T for up to `lanes` rows.
template <class A>
void multiply_columns(const A* h, int64_t h_stride, const A* weight, int64_t weight_stride, int64_t features, int n,
                      int outputs, A* sums /* [C][lanes] vectors */, A* out) {
  // Rows whose sums for five outputs fit the registers, beside the operands.
  constexpr int most = many_registers ? 4 : 2, rows = most < lanes<A> ? most : lanes<A>;
  constexpr int64_t part = depth_steps * lanes<A>;
  for (int64_t d = 0; d == 0 || d < features; d += part) {
    const int64_t left = features - d, count = left < part ? left : part;
    // The processor does not prefetch short pieces of rows that lie far apart.
    const int64_t ahead = features <= 4 * part ? 0 : left > part ? part : lanes<A> * h_stride - d;
    dot_rows<A, rows>(h + d, h_stride, weight + d, weight_stride, count, ahead, n, outputs, d == 0, sums);
  }
  for (int c = 0; c < outputs; ++c) {
    A* of_output = sums + c * lanes<A> * lanes<A>;
    for (int r = n; r < lanes<A>; ++r) store<A>(of_output + r * lanes<A>, Vec<A>{});
    store<A>(out + c * lanes<A>, sums_of<A>(of_output));
  }
}

// Scratch memory of a block of rows. A column is [C][lanes], for up to `lanes` rows.
template <class A>
struct ColumnBlock {
  A *logits, *tangent, *targets;  // columns
  A* results;                     // [most_rows / lanes] columns
  A* sums;                        // [C][lanes] vectors
  A *totals, *lost;               // columns: sums over rows, and their rounding errors (Kahan)
  A* features;                    // [most_rows, padded_features], used where the features cannot be read in place

  static int64_t size(const RowProgram<A>& p, bool copies_features) {
    const int64_t column = p.outputs * lanes<A>;
    return (5 + lanes<A>)*column + most_rows * (p.outputs + (copies_features ? p.padded_features : 0));
  }
  ColumnBlock(const RowProgram<A>& p, A* scratch) {
    const int64_t column = p.outputs * lanes<A>;
    logits = scratch;
    tangent = logits + column;
    targets = tangent + column;
    totals = targets + column;
    lost = totals + column;
    sums = lost + column;
    results = sums + lanes<A> * column;
    features = results + most_rows * p.outputs;
  }
};

// The outputs of rows [first, first + n), whose features begin at h.
template <class A>
void output_columns(const OutputRows<A>& outputs, const RowProgram<A>& p, const A* h, int64_t h_stride, int64_t first,
                    int n, A* sums, A* out) {
  const int count = static_cast<int>(p.outputs);
  if (outputs.factor == nullptr) {
    columns_of<A>(outputs.rows, first, n, count, out);
  } else {
    multiply_columns<A>(h, h_stride, outputs.factor, outputs.factor_stride, p.num_features, n, count, sums, out);
  }
  if (outputs.bias == nullptr) return;
  for (int c = 0; c < count; ++c) store<A>(out + c * lanes<A>, load<A>(out + c * lanes<A>) + outputs.bias[c]);
}

template <class A>
void target_columns(const RowProgram<A>& p, int64_t first, int n, A* out) {
  const int count = static_cast<int>(p.outputs);
  if (p.classes == nullptr) return columns_of<A>(p.targets, first, n, count, out);
  for (int c = 0; c < count; ++c) store<A>(out + c * lanes<A>, Vec<A>{});
  for (int r = 0; r < n; ++r) out[p.classes[first + r] * lanes<A> + r] = 1;
}

// Multiplies results by example weights; rows beyond n become 0, so that sums ignore them.
template <class A>
void weigh_columns(const RowProgram<A>& p, int64_t first, int n, A* results) {
  alignas(64) A weights[lanes<A>];
  for (int r = 0; r < lanes<A>; ++r) weights[r] = 1;
  if (p.weights) load_elements<A>(p.weights, first, n, weights);
  const auto inside = first_lanes<A>(n);
  const Vec<A> weight = load<A>(weights);
  for (int c = 0; c < p.outputs; ++c) {
    A* place = results + c * lanes<A>;
    store<A>(place, inside ? load<A>(place) * weight : Vec<A>{});
  }
}

// Compensated sums (Kahan), lane by lane.
template <class A>
void add_columns(const RowProgram<A>& p, const ColumnBlock<A>& block, const A* results) {
  for (int c = 0; c < p.outputs; ++c) {
    const int64_t place = c * lanes<A>;
    const Vec<A> part = load<A>(results + place) - load<A>(block.lost + place);
    const Vec<A> before = load<A>(block.totals + place), after = before + part;
    store<A>(block.lost + place, (after - before) - part);
    store<A>(block.totals + place, after);
  }
}

template <class A>
void store_dots(const RowProgram<A>& p, const A* results, const A* tangent, int64_t first, int n) {
  alignas(64) A dots[lanes<A>];
  const auto *r = reinterpret_cast<const Vec<A>*>(results), *z = reinterpret_cast<const Vec<A>*>(tangent);
  store<A>(dots, dot(static_cast<int>(p.outputs), r, z, NoReduce<A>()));
  store_row<A>(dots, n, 1, p.dots, first);  // stride 1
}

// FiniteDifferenceStep for rows [begin, end).
template <class A>
void step_columns(const FiniteDifferenceStep<A>& s, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const int count = static_cast<int>(s.outputs);
  alignas(64) A plus[few_outputs * lanes<A>], minus[few_outputs * lanes<A>], labels[few_outputs * lanes<A>];
  for (int64_t first = begin; first < end; first += lanes<A>) {
    const int n = static_cast<int>(first + lanes<A> < end ? lanes<A> : end - first);
    columns_of<A>(s.plus, first, n, count, plus);
    columns_of<A>(s.minus, first, n, count, minus);
    columns_of<A>(s.labels, first, n, count, labels);
    step_labels(s, count, reinterpret_cast<V*>(plus), reinterpret_cast<V*>(minus), reinterpret_cast<V*>(labels),
                NoReduce<A>());
    store_columns<A>(labels, n, count, A{1}, s.out, first);
  }
}

template <class A>
void run_columns(const RowProgram<A>& p, int64_t begin, int64_t end, int64_t chunk) {
  const bool uses_features = p.logits.factor != nullptr || p.tangent.factor != nullptr || p.gradient != nullptr;
  const bool copies = uses_features && !has_features_in_place(p);
  const Buffer<A> scratch(ColumnBlock<A>::size(p, copies));
  const ColumnBlock<A> block(p, scratch.data());
  const int64_t column = p.outputs * lanes<A>, gradient_size = p.outputs * p.padded_features;
  A* gradient = p.gradient == nullptr ? nullptr : p.gradient + chunk * gradient_size;
  if (gradient != nullptr) std::memset(gradient, 0, static_cast<size_t>(gradient_size) * sizeof(A));
  if (p.column_sums != nullptr) std::memset(block.totals, 0, static_cast<size_t>(2 * column) * sizeof(A));
  const bool needs_logits = p.logits.factor != nullptr || p.logits.rows;
  const bool needs_tangent = p.dots || p.function != RowFunction::residual;
  const bool needs_targets = reads_targets(p.loss, p.function);
  const int count = static_cast<int>(p.outputs);
  for (int64_t first = begin; first < end; first += most_rows) {
    const int n = static_cast<int>(first + most_rows < end ? most_rows : end - first);
    FeatureRows<A> h{};
    if (uses_features) h = features_of(p, block.features, first, n);
    for (int g = 0; g < n; g += lanes<A>) {
      const int64_t row = first + g;
      const int rows = n - g < lanes<A> ? n - g : lanes<A>;
      const A* from = h.data + g * h.stride;
      A* results = block.results + g * p.outputs;
      if (needs_logits) output_columns(p.logits, p, from, h.stride, row, rows, block.sums, block.logits);
      if (needs_tangent) output_columns(p.tangent, p, from, h.stride, row, rows, block.sums, block.tangent);
      if (needs_targets) target_columns(p, row, rows, block.targets);
      row_function<A>(p, count, block.logits, block.targets, block.tangent, results, NoReduce<A>());
      if (p.dots) {
        store_dots(p, results, block.tangent, row, rows);
        continue;
      }
      if (p.weights || rows < lanes<A>) weigh_columns(p, row, rows, results);
      if (p.column_sums != nullptr) add_columns(p, block, results);
      if (p.rows) store_columns<A>(results, rows, count, p.scale, p.rows, row);
    }
    if (gradient != nullptr) {
      accumulate<A>(ByColumns<A>{block.results, count}, count, h.data, h.stride, n, gradient, p.padded_features);
    }
  }
  if (p.column_sums == nullptr) return;
  for (int c = 0; c < count; ++c) {
    p.column_sums[chunk * p.padded + c] = LaneReduce<A>::sum(load<A>(block.totals + c * lanes<A>))[0];
  }
}

}  // namespace fastmeta::FASTMETA_TARGET
