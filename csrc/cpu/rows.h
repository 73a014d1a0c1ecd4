// The row engine for more than a few outputs: a block of rows at a time is loaded or multiplied, goes through the row
// function and is stored; no [N, C] intermediate. Included once for each instruction set (kernels.cpp).
namespace fastmeta::FASTMETA_TARGET {

// Scratch memory of a block of rows, all [block, padded] unless said otherwise.
template <class A>
struct Block {
  int64_t rows;
  A* logits;
  A* tangent;
  A* targets;
  A* result;
  A* lost;      // [padded]: rounding errors of the column sums (Kahan)
  A* features;  // [block, padded_features], used where the features cannot be read in place
};

// The features of rows [first, first + n): in place if they are of type A and whole vectors, else copied.
template <class A>
struct FeatureRows {
  const A* data;  // [n, padded_features]
  int64_t stride;
};

template <class A>
bool has_features_in_place(const RowProgram<A>& p) {
  const bool same_type = p.features.element == (sizeof(A) == 8 ? Element::float64 : Element::float32);
  return same_type && (p.gradient == nullptr || p.padded_features == p.num_features);
}

template <class A>
FeatureRows<A> features_of(const RowProgram<A>& p, A* copies, int64_t first, int64_t n) {
  if (has_features_in_place(p)) {
    return {static_cast<const A*>(p.features.data) + first * p.features.stride, p.features.stride};
  }
  for (int64_t r = 0; r < n; ++r) {
    load_row<A>(p.features, first + r, p.num_features, 0.0, copies + r * p.padded_features);
  }
  return {copies, p.padded_features};
}

// out [n, padded] = the outputs' rows [first, first + n), the lanes beyond C set to `padding`.
template <class A>
void outputs_of(const OutputRows<A>& outputs, const RowProgram<A>& p, const FeatureRows<A>& h, int64_t first, int64_t n,
                double padding, A* out) {
  if (outputs.factor != nullptr) {
    multiply<A>(h.data, h.stride, outputs.factor, p.num_features, n, out, p.padded);
  } else {
    for (int64_t r = 0; r < n; ++r) load_row<A>(outputs.rows, first + r, p.outputs, padding, out + r * p.padded);
  }
  if (outputs.bias != nullptr) {
    for (int64_t r = 0; r < n; ++r) {
      A* row = out + r * p.padded;
      for (int64_t c = 0; c < p.padded; c += lanes<A>) store<A>(row + c, load<A>(row + c) + load<A>(outputs.bias + c));
    }
  }
  // NaN or inf features times the zeros of the padding are NaN: set the padding again.
  if (outputs.factor != nullptr && p.outputs < p.padded) {
    const int64_t last = p.padded - lanes<A>;
    const auto inside = first_lanes<A>(p.outputs - last);
    for (int64_t r = 0; r < n; ++r) {
      A* place = out + r * p.padded + last;
      store<A>(place, inside ? load<A>(place) : splat<Vec<A>>(padding));
    }
  }
}

template <class A>
void targets_of(const RowProgram<A>& p, int64_t first, int64_t n, A* out) {
  for (int64_t r = 0; r < n; ++r) {
    A* row = out + r * p.padded;
    if (p.classes == nullptr) {
      load_row<A>(p.targets, first + r, p.outputs, 0.0, row);
    } else {
      for (int64_t c = 0; c < p.padded; c += lanes<A>) store<A>(row + c, Vec<A>{});
      row[p.classes[first + r]] = 1;
    }
  }
}

// Logits f, targets y and tangents z of `count` vectors; may overwrite z.
template <class A, class Reduce>
void row_function(const RowProgram<A>& p, int count, const A* logits, const A* targets, A* tangent, A* result,
                  const Reduce& reduce) {
  const auto *f = reinterpret_cast<const Vec<A>*>(logits), *y = reinterpret_cast<const Vec<A>*>(targets);
  auto *z = reinterpret_cast<Vec<A>*>(tangent), *out = reinterpret_cast<Vec<A>*>(result);
  row_function(p.loss, p.function, count, f, y, z, out, reduce);
}

// Multiplies each row by its example weight, in place.
template <class A>
void weigh(const RowProgram<A>& p, const Block<A>& block, int64_t first, int64_t n) {
  alignas(64) A weight[lanes<A>];
  for (int64_t r = 0; r < n; ++r) {
    A* row = block.result + r * p.padded;
    load_row<A>(p.weights, first + r, 1, 0.0, weight);
    for (int64_t c = 0; c < p.padded; c += lanes<A>) store<A>(row + c, load<A>(row + c) * weight[0]);
  }
}

// Adds the block's rows to the column sums: four running sums in a block, compensated sums (Kahan) across blocks.
template <class A>
void sum_columns(const RowProgram<A>& p, const Block<A>& block, int64_t n, A* column_sums) {
  for (int64_t c = 0; c < p.padded; c += lanes<A>) {
    Vec<A> sums[4] = {};
    for (int64_t r = 0; r < n; ++r) sums[r % 4] += load<A>(block.result + r * p.padded + c);
    const Vec<A> part = (sums[0] + sums[1]) + (sums[2] + sums[3]) - load<A>(block.lost + c);
    const Vec<A> before = load<A>(column_sums + c), after = before + part;
    store<A>(block.lost + c, (after - before) - part);
    store<A>(column_sums + c, after);
  }
}

// Makes the results of a block: dots, or weighted rows, their column sums and the gradient.
template <class A>
void results(const RowProgram<A>& p, const Block<A>& block, const FeatureRows<A>& h, int64_t first, int64_t n,
             int64_t chunk) {
  if (p.dots) {
    const int count = static_cast<int>(p.padded / lanes<A>);
    for (int64_t r = 0; r < n; ++r) {
      const auto* row = reinterpret_cast<const Vec<A>*>(block.result + r * p.padded);
      const auto* z = reinterpret_cast<const Vec<A>*>(block.tangent + r * p.padded);
      alignas(64) A value[lanes<A>];
      store<A>(value, dot(count, row, z, LaneReduce<A>()));
      store_row<A>(value, 1, 1, p.dots, first + r);
    }
    return;
  }
  A* column_sums = p.column_sums == nullptr ? nullptr : p.column_sums + chunk * p.padded;
  if (p.weights) weigh(p, block, first, n);
  if (column_sums != nullptr) sum_columns(p, block, n, column_sums);
  if (p.rows) {
    for (int64_t r = 0; r < n; ++r) store_row<A>(block.result + r * p.padded, p.outputs, p.scale, p.rows, first + r);
  }
  if (p.gradient != nullptr) {
    accumulate<A>(ByRows<A>{block.result, p.padded}, p.outputs, h.data, h.stride, n,
                  p.gradient + chunk * p.outputs * p.padded_features, p.padded_features);
  }
}

// Rows of a block: its scratch memory fits the first-level cache, and the features of a wide layer the second. A factor
// that does not fit the second-level cache takes 32 rows, which pay for reading it.
template <class A>
int64_t block_rows(const RowProgram<A>& p, bool uses_features, bool uses_factor) {
  if (uses_factor && p.padded * p.num_features > 65536) return 32;
  int64_t rows = 2048 / p.padded;
  if (uses_features && rows * p.padded_features > 32768) rows = 32768 / p.padded_features;
  return rows < 1 ? 1 : rows < 8 ? (uses_features ? 8 : rows) : rows > 32 ? 32 : rows / 8 * 8;
}

template <class A>
void run_rows(const RowProgram<A>& p, int64_t begin, int64_t end, int64_t chunk) {
  const bool uses_factor = p.logits.factor != nullptr || p.tangent.factor != nullptr;
  const bool uses_features = uses_factor || p.gradient != nullptr;
  const int64_t most = block_rows(p, uses_features, uses_factor), area = most * p.padded;
  const bool copies = uses_features && !has_features_in_place(p);
  const Buffer<A> scratch(4 * area + p.padded + (copies ? most * p.padded_features : 0));
  Block<A> block{most,
                 scratch.data(),
                 scratch.data() + area,
                 scratch.data() + 2 * area,
                 scratch.data() + 3 * area,
                 scratch.data() + 4 * area,
                 scratch.data() + 4 * area + p.padded};
  if (p.gradient != nullptr) {
    const int64_t size = p.outputs * p.padded_features;
    std::memset(p.gradient + chunk * size, 0, static_cast<size_t>(size) * sizeof(A));
  }
  if (p.column_sums != nullptr) {
    std::memset(block.lost, 0, static_cast<size_t>(p.padded) * sizeof(A));
    std::memset(p.column_sums + chunk * p.padded, 0, static_cast<size_t>(p.padded) * sizeof(A));
  }
  const double padding = padding_logit(p.loss);
  const bool needs_logits = p.logits.factor != nullptr || p.logits.rows;
  const bool needs_tangent = p.dots || p.function != RowFunction::residual;
  const bool needs_targets = reads_targets(p.loss, p.function);
  for (int64_t first = begin; first < end; first += most) {
    const int64_t n = first + most < end ? most : end - first;
    FeatureRows<A> h{};
    if (uses_features) h = features_of(p, block.features, first, n);
    if (needs_logits) outputs_of(p.logits, p, h, first, n, padding, block.logits);
    if (needs_tangent) outputs_of(p.tangent, p, h, first, n, 0.0, block.tangent);
    if (needs_targets) targets_of(p, first, n, block.targets);
    for (int64_t row = 0; row < n; ++row) {
      const int64_t at = row * p.padded;
      row_function<A>(p, static_cast<int>(p.padded / lanes<A>), block.logits + at, block.targets + at,
                      block.tangent + at, block.result + at, LaneReduce<A>());
    }
    results(p, block, h, first, n, chunk);
  }
}

// y = y - step (softmax(p) - softmax(m)), projected if asked, for a row in `count` vectors. Overwrites p and m.
template <class A, class Reduce>
FASTMETA_INLINE void step_labels(const FiniteDifferenceStep<A>& s, int count, Vec<A>* p, Vec<A>* m, Vec<A>* y,
                                 const Reduce& reduce) {
  using V = Vec<A>;
  const V zero = splat<V>(0);
  softmax(count, p, p, reduce);
  softmax(count, m, m, reduce);
  V total = zero;
  for (int k = 0; k < count; ++k) {
    y[k] -= s.step * (p[k] - m[k]);
    if (s.project) y[k] = y[k] < zero ? zero : y[k];
    total += y[k];
  }
  if (!s.project) return;
  total = reduce.sum(total);
  const V equal = splat<V>(1.0 / static_cast<double>(s.outputs));
  for (int k = 0; k < count; ++k) y[k] = total == zero ? equal : y[k] / total;
}

template <class A>
void step_rows(const FiniteDifferenceStep<A>& s, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const int64_t padded = (s.outputs + lanes<A> - 1) / lanes<A> * lanes<A>;
  const double padding = softmax_padding;
  const Buffer<A> scratch(3 * padded);
  A *plus = scratch.data(), *minus = plus + padded, *labels = minus + padded;
  for (int64_t row = begin; row < end; ++row) {
    load_row<A>(s.plus, row, s.outputs, padding, plus);
    load_row<A>(s.minus, row, s.outputs, padding, minus);
    load_row<A>(s.labels, row, s.outputs, 0.0, labels);
    step_labels(s, static_cast<int>(padded / lanes<A>), reinterpret_cast<V*>(plus), reinterpret_cast<V*>(minus),
                reinterpret_cast<V*>(labels), LaneReduce<A>());
    store_row<A>(labels, s.outputs, A{1}, s.out, row);
  }
}

}  // namespace fastmeta::FASTMETA_TARGET
