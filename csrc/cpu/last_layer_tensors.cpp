#include "last_layer_tensors.h"

#include "gemm.h"

namespace fastmeta {

namespace {

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
  void combine(Combination<A> combination, const OptionalTensor& addend, const Tensor& out) const;

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
  const auto product = [&](const Tensor& weight, Outputs<A>& outputs) {
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
void GemmLastLayer<A>::combine(Combination<A> combination, const OptionalTensor& addend, const Tensor& out) const {
  if (combination.factor != 0) combination.addend = matrix_of(TensorView(addend));
  combination.out = matrix_of(TensorView(out));
  run_combination(combination);
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
