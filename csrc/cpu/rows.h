// The row engine: a block of rows at a time, operands in, a row function, results out; nothing [N, C] in between.
// Included once for each instruction set (kernels.h).
namespace fastmeta::FASTMETA_TARGET {

// Scratch memory of a block of rows, all [block, padded] unless said otherwise.
template <class A>
struct Block {
  int64_t rows;
  A* logits;
  A* tangent;
  A* targets;
  A* result;
  A* lost;      // [padded]: what the column sums have lost to rounding
  A* features;  // [block, padded_features], used where the features cannot be read in place
};

// The features of rows [first, first + n): in place if they are of type A and whole vectors, else copied.
template <class A>
struct FeatureRows {
  const A* data;  // [n, padded_features]
  int64_t stride;
};

template <class A>
FeatureRows<A> features_of(const RowProgram<A>& p, const Block<A>& block, int64_t first, int64_t n) {
  const bool same_type = p.features.element == (sizeof(A) == 8 ? Element::float64 : Element::float32);
  if (same_type && (p.gradient == nullptr || p.padded_features == p.num_features)) {
    return {static_cast<const A*>(p.features.data) + first * p.features.stride, p.features.stride};
  }
  for (int64_t r = 0; r < n; ++r) {
    load_row<A>(p.features, first + r, p.num_features, 0.0, block.features + r * p.padded_features);
  }
  return {block.features, p.padded_features};
}

// out [n, padded] = the outputs' rows [first, first + n), the lanes beyond C set to `padding`.
template <class A>
void outputs_of(const Outputs<A>& outputs, const RowProgram<A>& p, const FeatureRows<A>& h, int64_t first, int64_t n,
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
  // A product with NaN or inf features leaves no zeros in the padding.
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

template <class A, Loss loss>
FASTMETA_INLINE void row_function(RowFunction function, int count, const Vec<A>* f, const Vec<A>* y, Vec<A>* z,
                                  Vec<A>* out) {
  if (function == RowFunction::residual) {
    residual<loss>(count, f, y, out, LaneReduce<A>());
  } else if (function == RowFunction::label_tangent) {
    label_tangent<loss>(count, f, z, out, LaneReduce<A>());
  } else {
    curvature<loss>(count, f, z, out, LaneReduce<A>());
  }
}

template <class A, Loss loss>
void row_functions(const RowProgram<A>& p, const Block<A>& block, int64_t n) {
  const int count = static_cast<int>(p.padded / lanes<A>);
  for (int64_t r = 0; r < n; ++r) {
    const auto* f = reinterpret_cast<const Vec<A>*>(block.logits + r * p.padded);
    const auto* y = reinterpret_cast<const Vec<A>*>(block.targets + r * p.padded);
    auto* z = reinterpret_cast<Vec<A>*>(block.tangent + r * p.padded);
    auto* out = reinterpret_cast<Vec<A>*>(block.result + r * p.padded);
    // One vector a row is the common small head: its loops vanish.
    if (count == 1) {
      row_function<A, loss>(p.function, 1, f, y, z, out);
    } else {
      row_function<A, loss>(p.function, count, f, y, z, out);
    }
  }
}

template <class A>
void row_functions(const RowProgram<A>& p, const Block<A>& block, int64_t n) {
  switch (p.loss) {
    case Loss::cross_entropy:
      return row_functions<A, Loss::cross_entropy>(p, block, n);
    case Loss::binary_cross_entropy:
      return row_functions<A, Loss::binary_cross_entropy>(p, block, n);
    case Loss::mse:
      return row_functions<A, Loss::mse>(p, block, n);
    case Loss::mse_probs:
      return row_functions<A, Loss::mse_probs>(p, block, n);
  }
}

// Weights the rows in place.
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

// Where the rows go.
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
    accumulate<A>(block.result, p.padded, p.outputs, h.data, h.stride, n,
                  p.gradient + chunk * p.outputs * p.padded_features, p.padded_features);
  }
}

// Rows to a block: all of its scratch memory stays in the first-level cache, and the features of a wide layer in the
// second, unless a factor comes from beyond that, which more rows pay for.
template <class A>
int64_t block_rows(const RowProgram<A>& p, bool uses_features, bool uses_factor) {
  if (uses_factor && p.padded * p.num_features > 65536) return 32;
  int64_t rows = 2048 / p.padded;
  if (uses_features && rows * p.padded_features > 32768) rows = 32768 / p.padded_features;
  return rows < 1 ? 1 : rows < 8 ? (uses_features ? 8 : rows) : rows > 32 ? 32 : rows / 8 * 8;
}

template <class A>
void run(const RowProgram<A>& p, int64_t begin, int64_t end, int64_t chunk) {
  const bool uses_factor = p.logits.factor != nullptr || p.tangent.factor != nullptr;
  const bool uses_features = uses_factor || p.gradient != nullptr;
  const int64_t most = block_rows(p, uses_features, uses_factor), area = most * p.padded;
  Buffer<A> scratch(4 * area + p.padded + (uses_features ? most * p.padded_features : 0));
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
  for (int64_t first = begin; first < end; first += most) {
    const int64_t n = first + most < end ? most : end - first;
    FeatureRows<A> h{};
    if (uses_features) h = features_of(p, block, first, n);
    if (needs_logits) outputs_of(p.logits, p, h, first, n, padding, block.logits);
    if (needs_tangent) outputs_of(p.tangent, p, h, first, n, 0.0, block.tangent);
    if (p.function == RowFunction::residual) targets_of(p, first, n, block.targets);
    row_functions(p, block, n);
    results(p, block, h, first, n, chunk);
  }
}

}  // namespace fastmeta::FASTMETA_TARGET
