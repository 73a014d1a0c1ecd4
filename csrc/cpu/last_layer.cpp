#include "last_layer.h"

#include <cstring>

#include "buffer.h"

namespace fastmeta {

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Example weights are read an element a row.
bool has_dense_rows(const LastLayerOperands<View>& x) {
  const auto dense = [](const View& tensor) { return !tensor.has_value() || tensor.has_dense_rows(); };
  return dense(x.features) && dense(x.logits) && dense(x.head_weight) && dense(x.head_bias) && dense(x.targets) &&
         dense(x.direction_weight) && dense(x.direction_bias) && dense(x.tangent);
}

// Whether the rows of a weight are read where they are: of the right type, and few enough to a page of memory, or their
// parts that are read together would compete for the same places of the first-level cache.
template <class A>
bool lies_well(const View& weight) {
  const int64_t features = weight.size(1);
  return weight.scalar_type() == accumulation_type<A> && features > 0 && features <= 512;
}

// Floats from row to row of a copy: a quarter of a page beyond whole pages.
int64_t copied_stride(int64_t padded_features) { return round_up(padded_features, 1024) + 256; }

// The program of a call, and what it points to beside the operands: packed factors and biases.
template <class A>
class PackedRows {
 public:
  RowProgram<A> program;

  // Throws where a class is out of range. Rows of operands are dense, but for example weights and, without
  // `multiplies`, features.
  PackedRows(const LastLayerCall& call, bool multiplies);
  // Rows [0, rows) of a program, this one or one like it.
  void run(const RowProgram<A>& part, int64_t rows, int64_t chunks) const {
    const auto kernel = part.outputs <= few_outputs ? kernels_.run_columns : kernels_.run_rows;
    for_chunks(rows, chunks, [&](int64_t begin, int64_t end, int64_t chunk) { kernel(part, begin, end, chunk); });
  }
  int64_t chunks_of(int64_t rows, int gradients = 0) const {
    const RowProgram<A>& p = program;
    const int64_t lanes_used = p.outputs <= few_outputs ? p.outputs : p.padded;
    const double vectors = static_cast<double>(lanes_used) / kernels_.lanes;
    const double features = static_cast<double>(p.num_features);
    const int products = (p.logits.factor != nullptr) + (p.tangent.factor != nullptr) + gradients;
    return parallel_chunks(rows, static_cast<double>(rows) * vectors * (features * products + 64));
  }

 private:
  static int64_t packed_size(const LastLayerCall& call, bool multiplies);
  void pack(const View& weight, OutputRows<A>& outputs, A*& place) const;
  // [C] -> [padded]
  void pack_bias(const View& bias, OutputRows<A>& outputs, A*& place) const {
    if (!bias.has_value()) return;
    kernels_.widen(matrix_of(bias), program.outputs, place);
    outputs.bias = place;
    place += program.padded;
  }

  const RowKernels<A>& kernels_;
  const Buffer<A> packed_;
};

template <class A>
int64_t PackedRows<A>::packed_size(const LastLayerCall& call, bool multiplies) {
  const int64_t lanes = row_kernels<A>().lanes;
  const int64_t padded = round_up(call.sizes.outputs, lanes), padded_features = round_up(call.sizes.features, lanes);
  int64_t size = 2 * padded;
  for (const View& weight : {call.operands.head_weight, call.operands.direction_weight}) {
    if (!multiplies || !weight.has_value()) continue;
    if (call.sizes.outputs > few_outputs) {
      size += padded * call.sizes.features;
    } else if (!lies_well<A>(weight)) {
      size += call.sizes.outputs * copied_stride(padded_features);
    }
  }
  return size;
}

template <class A>
PackedRows<A>::PackedRows(const LastLayerCall& call, bool multiplies)
    : kernels_(row_kernels<A>()), packed_(packed_size(call, multiplies)) {
  const LastLayerOperands<View>& x = call.operands;
  RowProgram<A>& p = program;
  p.function = call.function;
  p.loss = call.loss;
  p.outputs = call.sizes.outputs;
  p.padded = round_up(p.outputs, kernels_.lanes);
  p.num_features = call.sizes.features;
  p.padded_features = round_up(p.num_features, kernels_.lanes);
  p.scale = static_cast<A>(call.scale);
  if (x.targets.has_value() && x.targets.scalar_type() == ScalarType::Long) {
    p.classes = static_cast<const int64_t*>(x.targets.data());
    check_classes(p.classes, call.sizes.examples, p.outputs);
  } else {
    p.targets = matrix_of(x.targets);
  }
  if (p.outputs == 0) return;
  p.logits.rows = matrix_of(x.logits);
  p.tangent.rows = matrix_of(x.tangent);
  p.weights = matrix_of(x.weights);
  A* place = packed_.data();
  pack_bias(x.head_bias, p.logits, place);
  pack_bias(x.direction_bias, p.tangent, place);
  if (!multiplies) return;
  p.features = matrix_of(x.features);
  pack(x.head_weight, p.logits, place);
  // Only a tangent meets the direction; last_layer_gradient has none.
  if (call.result == LastLayerResult::dots || call.function != RowFunction::residual) {
    pack(x.direction_weight, p.tangent, place);
  }
}

template <class A>
void PackedRows<A>::pack(const View& weight, OutputRows<A>& outputs, A*& place) const {
  if (!weight.has_value()) return;
  const RowProgram<A>& p = program;
  const Matrix matrix = matrix_of(weight);
  outputs.factor = place;
  if (p.outputs > few_outputs) {
    const double operations = static_cast<double>(p.padded * p.num_features);
    for_chunks(p.num_features, parallel_chunks(p.num_features, operations), [&](int64_t begin, int64_t end, int64_t) {
      kernels_.pack(matrix, p.outputs, p.padded, p.num_features, begin, end, place);
    });
    place += p.padded * p.num_features;
  } else if (lies_well<A>(weight)) {
    outputs.factor = static_cast<const A*>(matrix.data);
    outputs.factor_stride = matrix.stride;
  } else {
    outputs.factor_stride = copied_stride(p.padded_features);
    for (int64_t c = 0; c < p.outputs; ++c, place += outputs.factor_stride) {
      kernels_.widen(matrix.from(c), p.num_features, place);
    }
  }
}

template <class A>
void run_gradient(const LastLayerCall& call, PackedRows<A>& rows, DLTensor* const* out) {
  const LastLayerSizes& sizes = call.sizes;
  RowProgram<A>& p = rows.program;
  const int64_t chunks = rows.chunks_of(sizes.examples, 1);
  const Matrix weight = matrix_of(out[0]);
  const A factor = static_cast<A>(call.damping);
  const bool in_place = chunks == 1 && factor == 0 && p.padded_features == p.num_features &&
                        weight.element == element_of(accumulation_type<A>);
  const Buffer<A> column_sums(chunks * p.padded);
  const Buffer<A> parts(in_place ? 0 : chunks * p.outputs * p.padded_features);
  p.column_sums = column_sums.data();
  p.gradient = in_place ? static_cast<A*>(weight.data) : parts.data();
  rows.run(p, sizes.examples, chunks);
  if (!in_place) {
    run_combination<A>({.parts = {parts.data(), p.padded_features, element_of(accumulation_type<A>)},
                        .chunks = chunks,
                        .rows = sizes.outputs,
                        .columns = sizes.features,
                        .addend = factor == 0 ? Matrix{} : matrix_of(call.operands.direction_weight),
                        .factor = factor,
                        .out = weight});
  }
  if (out[1]->shape[0] == 0) return;
  run_combination<A>({.parts = {column_sums.data(), p.padded, element_of(accumulation_type<A>)},
                      .chunks = chunks,
                      .rows = 1,
                      .columns = sizes.outputs,
                      .addend = factor == 0 ? Matrix{} : matrix_of(call.operands.direction_bias),
                      .factor = factor,
                      .out = matrix_of(out[1])});
}

template <class A>
void run_own(const LastLayerCall& call, DLTensor* const* out) {
  PackedRows<A> rows(call, true);
  RowProgram<A>& p = rows.program;
  const int64_t examples = call.sizes.examples;
  if (p.outputs == 0) {
    const View dots = out[0];
    if (call.result == LastLayerResult::dots) std::memset(dots.data(), 0, examples * dots.element_size());
    return;
  }
  if (call.result == LastLayerResult::gradient) return run_gradient(call, rows, out);
  (call.result == LastLayerResult::dots ? p.dots : p.rows) = matrix_of(out[0]);
  rows.run(p, examples, rows.chunks_of(examples));
}

template <class To, class From, class F>
LastLayerOperands<To> each(From& x, const F& f) {
  return {f(x.features), f(x.logits),           f(x.head_weight),    f(x.head_bias), f(x.targets),
          f(x.weights),  f(x.direction_weight), f(x.direction_bias), f(x.tangent)};
}

// Tensors and the views of them.
struct Viewed {
  LastLayerOperands<OptionalTensor> tensors;
  LastLayerOperands<TensorView> memory;
  LastLayerOperands<View> views;

  explicit Viewed(LastLayerOperands<OptionalTensor> given)
      : tensors(std::move(given)),
        memory(each<TensorView>(tensors, [](const OptionalTensor& tensor) { return TensorView(tensor); })),
        views(each<View>(memory, [](const TensorView& view) { return View(view); })) {}
  Viewed(const Viewed&) = delete;
};

// The same results by torch's GEMM before or after one pass over the rows. A is the type of accumulation.
template <class A>
class GemmLastLayer {
 public:
  GemmLastLayer(const LastLayerCall& call, const LastLayerOperands<OptionalTensor>& tensors)
      : call_(call), sizes_(call.sizes), x_(tensors), own_(call), rows_(call, own_.forward) {}

  // Into `out`: [N] or [N, C].
  void run_all(const Tensor& out) {
    const TensorView view(out);
    (call_.result == LastLayerResult::dots ? rows_.program.dots : rows_.program.rows) = matrix_of(view);
    const Tensor features = gemm_operand(*x_.features);
    const int64_t step = slice_rows();
    for (int64_t first = 0; first < sizes_.examples; first += step) {
      const Slice part = slice(first, std::min(step, sizes_.examples - first), features);
      rows_.run(part.program, part.rows, rows_.chunks_of(part.rows));
    }
  }

  std::array<OptionalTensor, 2> gradient(const Tensor& bias);

 private:
  // Some rows, with torch's products for what the program does not multiply itself.
  struct Slice {
    RowProgram<A> program;
    Tensor features;
    OptionalTensor logits, tangent;
    int64_t rows;
  };

  // All rows at once, except that logits recomputed from a head with C > D, where they outweigh everything else, exist
  // for some 4 MB at a time.
  int64_t slice_rows() const {
    if (!x_.head_weight.has_value() || sizes_.outputs <= sizes_.features) return std::max<int64_t>(1, sizes_.examples);
    return std::max<int64_t>(64, (1 << 20) / sizes_.outputs);
  }
  Slice slice(int64_t first, int64_t rows, const Tensor& features) const;
  void combine(Combination<A> combination, const OptionalTensor& addend, const Tensor& out) const {
    if (combination.factor != 0) combination.addend = matrix_of(TensorView(addend));
    combination.out = matrix_of(TensorView(out));
    run_combination(combination);
  }

  const LastLayerCall& call_;
  const LastLayerSizes& sizes_;
  const LastLayerOperands<OptionalTensor>& x_;
  const OwnProducts own_;
  PackedRows<A> rows_;
};

template <class A>
typename GemmLastLayer<A>::Slice GemmLastLayer<A>::slice(int64_t first, int64_t rows, const Tensor& features) const {
  Slice slice{rows_.program, rows_of(features, first, rows), std::nullopt, std::nullopt, rows};
  RowProgram<A>& p = slice.program;
  p.features = p.features.from(first);
  p.logits.rows = p.logits.rows.from(first);
  p.targets = p.targets.from(first);
  if (p.classes != nullptr) p.classes += first;
  p.weights = p.weights.from(first);
  p.dots = p.dots.from(first);
  p.rows = p.rows.from(first);
  const auto product = [&](const Tensor& weight, OutputRows<A>& outputs) {
    Tensor result = gemm(slice.features, transposed(gemm_operand(weight)));
    outputs.rows = matrix_of(TensorView(result));
    return result;
  };
  if (own_.forward) return slice;
  if (x_.head_weight.has_value()) slice.logits = product(*x_.head_weight, p.logits);
  if (x_.direction_weight.has_value()) slice.tangent = product(*x_.direction_weight, p.tangent);
  return slice;
}

template <class A>
std::array<OptionalTensor, 2> GemmLastLayer<A>::gradient(const Tensor& bias) {
  const ScalarType type = x_.features->scalar_type();
  const Tensor features = gemm_operand(*x_.features);
  const A damping = static_cast<A>(call_.damping);
  const int64_t step = slice_rows(), slices = std::max<int64_t>(1, (sizes_.examples + step - 1) / step);
  const int64_t chunks = rows_.chunks_of(std::min(step, sizes_.examples)), padded = rows_.program.padded;
  const Buffer<A> column_sums(slices * chunks * padded);
  rows_.program.column_sums = column_sums.data();
  OptionalTensor sum;
  for (int64_t first = 0; first == 0 || first < sizes_.examples; first += step) {
    Slice part = slice(first, std::min(step, sizes_.examples - first), features);
    // The rows take the place of a product that is no longer needed.
    const Tensor rows = part.tangent.has_value()  ? *part.tangent
                        : part.logits.has_value() ? *part.logits
                                                  : torch::stable::new_empty(features, {part.rows, sizes_.outputs});
    part.program.rows = matrix_of(TensorView(rows));
    rows_.run(part.program, part.rows, chunks);
    rows_.program.column_sums += chunks * padded;
    const Tensor product = gemm(transposed(rows), part.features);
    if (step >= sizes_.examples) {
      sum = product;
    } else {
      // Several slices add up in the accumulation type.
      const bool begun = sum.has_value();
      if (!begun) sum = torch::stable::new_empty(product, {sizes_.outputs, sizes_.features}, accumulation_type<A>);
      combine({.parts = matrix_of(TensorView(product)),
               .rows = sizes_.outputs,
               .columns = sizes_.features,
               .factor = static_cast<A>(begun)},
              sum, *sum);
    }
  }
  if (bias.size(0) > 0) {
    combine({.parts = {column_sums.data(), padded, element_of(accumulation_type<A>)},
             .chunks = slices * chunks,
             .rows = 1,
             .columns = sizes_.outputs,
             .factor = damping},
            x_.direction_bias, bias);
  }
  if (damping == 0 && sum->scalar_type() == type) return {*sum, bias};
  const Tensor out = torch::stable::new_empty(*x_.features, {sizes_.outputs, sizes_.features});
  combine({.parts = matrix_of(TensorView(*sum)), .rows = sizes_.outputs, .columns = sizes_.features, .factor = damping},
          x_.direction_weight, out);
  return {out, bias};
}

}  // namespace

OwnProducts::OwnProducts(const LastLayerSizes& sizes, ScalarType type) {
  const bool exact = type == ScalarType::Double;
  const int64_t lanes = exact ? row_kernels<double>().lanes : row_kernels<float>().lanes;
  const int64_t factor = sizes.features * round_up(sizes.outputs, lanes);
  const bool few = sizes.outputs <= few_outputs;
  const bool cached = isa() != Isa::baseline && factor * (exact ? 8 : 4) <= 1 << 20;
  if (type == ScalarType::BFloat16 && has_bfloat16_products()) {
    forward = gradient = (few || cached) && sizes.examples * factor <= 2'000'000;
  } else {
    gradient = few || cached;
    forward = gradient || (isa() == Isa::avx512 && sizes.examples >= 256);
  }
}

bool run_last_layer(const LastLayerCall& call, DLTensor* const* out) {
  if (!has_dense_rows(call.operands) || !OwnProducts(call).all(call.result)) return false;
  if (call.operands.features.scalar_type() == ScalarType::Double) {
    run_own<double>(call, out);
  } else {
    run_own<float>(call, out);
  }
  return true;
}

std::array<OptionalTensor, 2> call_last_layer(LastLayerOperands<OptionalTensor> operands, LastLayerCall call) {
  if (!reads_targets(call.loss, call.function)) operands.targets.reset();
  const Viewed given(operands);
  call.operands = given.views;
  call = checked(call);
  const OwnProducts own(call);
  LastLayerOperands<OptionalTensor> dense = each<OptionalTensor>(operands, dense_rows);
  dense.weights = operands.weights;                      // read an element a row
  if (!own.forward) dense.features = operands.features;  // torch's GEMM takes any strides
  const Viewed used(std::move(dense));
  call.operands = used.views;
  const Tensor& features = *operands.features;
  const auto [examples, num_features, outputs] = call.sizes;
  const auto empty = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(features, sizes); };
  std::array<OptionalTensor, 2> out;
  if (call.result != LastLayerResult::gradient) {
    out[0] = call.result == LastLayerResult::dots ? empty({examples}) : empty({examples, outputs});
  } else {
    const bool has_bias = call.function == RowFunction::residual || operands.direction_bias.has_value();
    out[1] = empty({has_bias ? outputs : 0});
    if (own.gradient || outputs == 0) out[0] = empty({outputs, num_features});
  }
  TensorView memory[] = {out[0], out[1]};
  DLTensor* const views[] = {memory[0].get(), memory[1].get()};
  if ((own.all(call.result) || outputs == 0) && run_last_layer(call, views)) return out;
  return with_accumulation(features.scalar_type(), [&](auto zero) -> std::array<OptionalTensor, 2> {
    GemmLastLayer<decltype(zero)> layer(call, used.tensors);
    if (call.result == LastLayerResult::gradient) return layer.gradient(*out[1]);
    layer.run_all(*out[0]);
    return out;
  });
}

}  // namespace fastmeta
