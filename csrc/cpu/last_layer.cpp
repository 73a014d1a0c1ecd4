#include "last_layer.h"

namespace fastmeta {

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class A>
constexpr Element accumulation = sizeof(A) == 8 ? Element::float64 : Element::float32;

}  // namespace

template <class A>
LastLayer<A>::LastLayer(const LastLayerSizes& sizes, LastLayerArguments arguments, Loss loss, RowFunction function)
    : sizes_(sizes), arguments_(std::move(arguments)), kernels_(row_kernels<A>()), own_(sizes, arguments_.features) {
  RowProgram<A>& p = program_;
  p.function = function;
  p.loss = loss;
  p.outputs = sizes.outputs;
  p.padded = round_up(sizes.outputs, kernels_.lanes);
  p.num_features = sizes.features;
  p.padded_features = round_up(sizes.features, kernels_.lanes);
  kept_.reserve(4);
  packed_.reserve(4);
  if (arguments_.targets.has_value() && arguments_.targets->scalar_type() == ScalarType::Long) {
    p.targets = read(*arguments_.targets);
    p.classes = static_cast<const int64_t*>(p.targets.data);
    check_classes(p.classes, sizes.examples, sizes.outputs);
  }
  if (sizes.outputs == 0) return;
  if (arguments_.targets.has_value() && p.classes == nullptr) p.targets = read(*arguments_.targets);
  if (arguments_.logits.has_value()) p.logits.rows = read(*arguments_.logits);
  if (arguments_.tangent.has_value()) p.tangent.rows = read(*arguments_.tangent);
  if (arguments_.weights.has_value()) p.weights = read(*arguments_.weights);
  p.logits.bias = pack_bias(arguments_.head_bias);
  p.tangent.bias = pack_bias(arguments_.direction_bias);
  if (own_.forward) p.features = read(arguments_.features);
  if (own_.forward && arguments_.head_weight.has_value()) p.logits.factor = pack(*arguments_.head_weight);
  if (own_.forward && arguments_.direction_weight.has_value()) p.tangent.factor = pack(*arguments_.direction_weight);
}

template <class A>
Matrix LastLayer<A>::read(const Tensor& tensor) {
  // A vector is read an element a row, except one of classes, which is read at once.
  kept_.push_back(tensor.dim() == 2 || tensor.scalar_type() == ScalarType::Long ? dense_rows(tensor) : tensor);
  return matrix_of(kept_.back());
}

// [C, D] -> [D, padded]
template <class A>
const A* LastLayer<A>::pack(const Tensor& weight) {
  const Tensor source = dense_rows(weight);
  const Matrix matrix = matrix_of(source);
  A* packed = packed_.emplace_back(program_.padded * sizes_.features).data();
  const double operations = static_cast<double>(program_.padded * sizes_.features);
  for_chunks(sizes_.features, parallel_chunks(sizes_.features, operations), [&](int64_t begin, int64_t end, int64_t) {
    kernels_.pack(matrix, sizes_.outputs, program_.padded, sizes_.features, begin, end, packed);
  });
  return packed;
}

// [C] -> [padded]
template <class A>
const A* LastLayer<A>::pack_bias(const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return nullptr;
  const Tensor source = dense_rows(*bias);
  A* packed = packed_.emplace_back(program_.padded).data();
  kernels_.widen(matrix_of(source), sizes_.outputs, packed);
  return packed;
}

template <class A>
int64_t LastLayer<A>::chunks_of(int64_t rows, int gradients) const {
  const RowProgram<A>& p = program_;
  const double vectors = static_cast<double>(p.padded / kernels_.lanes), features = static_cast<double>(p.num_features);
  const int products = (p.logits.factor != nullptr) + (p.tangent.factor != nullptr) + gradients;
  return parallel_chunks(rows, static_cast<double>(rows) * vectors * (features * products + 64));
}

template <class A>
void LastLayer<A>::run(const RowProgram<A>& program, int64_t rows, int64_t chunks) const {
  for_chunks(rows, chunks,
             [&](int64_t begin, int64_t end, int64_t chunk) { kernels_.run(program, begin, end, chunk); });
}

// All rows at once, except that logits recomputed from a head with C > D, where they outweigh everything else, exist
// for some 4 MB at a time.
template <class A>
int64_t LastLayer<A>::slice_rows() const {
  if (!arguments_.head_weight.has_value() || sizes_.outputs <= sizes_.features) {
    return std::max<int64_t>(1, sizes_.examples);
  }
  return std::max<int64_t>(64, (1 << 20) / sizes_.outputs);
}

template <class A>
typename LastLayer<A>::Slice LastLayer<A>::slice(int64_t first, int64_t rows, const Tensor& features) const {
  Slice slice{program_, rows_of(features, first, rows), std::nullopt, std::nullopt, rows};
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
    outputs.rows = matrix_of(result);
    return result;
  };
  if (own_.forward) return slice;
  if (arguments_.head_weight.has_value()) slice.logits = product(*arguments_.head_weight, p.logits);
  if (arguments_.direction_weight.has_value()) slice.tangent = product(*arguments_.direction_weight, p.tangent);
  return slice;
}

template <class A>
void LastLayer<A>::run_all() {
  if (own_.forward) return run(program_, sizes_.examples, chunks_of(sizes_.examples));
  const Tensor features = gemm_operand(arguments_.features);
  const int64_t step = slice_rows();
  for (int64_t first = 0; first < sizes_.examples; first += step) {
    const Slice part = slice(first, std::min(step, sizes_.examples - first), features);
    run(part.program, part.rows, chunks_of(part.rows));
  }
}

template <class A>
Tensor LastLayer<A>::dots() {
  Tensor out = torch::stable::new_empty(arguments_.features, {sizes_.examples});
  if (sizes_.outputs == 0) return torch::stable::zero_(out);
  program_.dots = matrix_of(out);
  run_all();
  return out;
}

template <class A>
Tensor LastLayer<A>::rows(double scale) {
  const Tensor out = torch::stable::new_empty(arguments_.features, {sizes_.examples, sizes_.outputs});
  if (sizes_.outputs == 0) return out;
  program_.rows = matrix_of(out);
  program_.scale = static_cast<A>(scale);
  run_all();
  return out;
}

template <class A>
void LastLayer<A>::combine(Combination<A> combination, const std::optional<Tensor>& addend, const Tensor& out) const {
  std::optional<Tensor> source;
  if (combination.factor != 0 && addend.has_value()) {
    source = dense_rows(*addend);
    combination.addend = matrix_of(*source);
  }
  combination.out = matrix_of(out);
  run_combination(combination);
}

template <class A>
Tensor LastLayer<A>::gradient_own(const Buffer<A>& column_sums, int64_t chunks, double damping, ScalarType type) {
  const Tensor out = torch::stable::new_empty(arguments_.features, {sizes_.outputs, sizes_.features}, type);
  const Buffer<A> parts(chunks * sizes_.outputs * program_.padded_features);
  program_.gradient = parts.data();
  program_.column_sums = column_sums.data();
  run(program_, sizes_.examples, chunks);
  combine({.parts = {parts.data(), program_.padded_features, accumulation<A>},
           .chunks = chunks,
           .rows = sizes_.outputs,
           .columns = sizes_.features,
           .factor = static_cast<A>(damping)},
          arguments_.direction_weight, out);
  return out;
}

template <class A>
Tensor LastLayer<A>::gradient_gemm(const Buffer<A>& column_sums, int64_t chunks, double damping, ScalarType type) {
  const Tensor features = gemm_operand(arguments_.features);
  const int64_t step = slice_rows();
  program_.column_sums = column_sums.data();
  std::optional<Tensor> sum;
  for (int64_t first = 0; first == 0 || first < sizes_.examples; first += step) {
    Slice part = slice(first, std::min(step, sizes_.examples - first), features);
    // The rows take the place of a product that is no longer needed.
    const Tensor rows = part.tangent.has_value()  ? *part.tangent
                        : part.logits.has_value() ? *part.logits
                                                  : torch::stable::new_empty(features, {part.rows, sizes_.outputs});
    part.program.rows = matrix_of(rows);
    run(part.program, part.rows, chunks);
    program_.column_sums += chunks * program_.padded;
    const Tensor product = gemm(transposed(rows), part.features);
    if (step >= sizes_.examples) {
      sum = product;
    } else {
      // Several slices add up in the accumulation type.
      const bool begun = sum.has_value();
      if (!begun) sum = torch::stable::new_empty(product, {sizes_.outputs, sizes_.features}, accumulation_type<A>);
      combine({.parts = matrix_of(product),
               .rows = sizes_.outputs,
               .columns = sizes_.features,
               .factor = static_cast<A>(begun)},
              sum, *sum);
    }
  }
  if (damping == 0 && sum->scalar_type() == type) return *sum;
  const Tensor out = torch::stable::new_empty(arguments_.features, {sizes_.outputs, sizes_.features}, type);
  combine(
      {.parts = matrix_of(*sum), .rows = sizes_.outputs, .columns = sizes_.features, .factor = static_cast<A>(damping)},
      arguments_.direction_weight, out);
  return out;
}

template <class A>
std::tuple<Tensor, Tensor> LastLayer<A>::gradient(bool with_bias, double damping, std::optional<ScalarType> as) {
  const ScalarType type = as.value_or(arguments_.features.scalar_type());
  const Tensor bias = torch::stable::new_empty(arguments_.features, {with_bias ? sizes_.outputs : 0}, type);
  if (sizes_.outputs == 0) return {torch::stable::new_empty(arguments_.features, {0, sizes_.features}, type), bias};
  const int64_t step = own_.gradient ? sizes_.examples : slice_rows();
  const int64_t slices = own_.gradient ? 1 : std::max<int64_t>(1, (sizes_.examples + step - 1) / step);
  const int64_t chunks = chunks_of(std::min(step, sizes_.examples), own_.gradient ? 1 : 0);
  const Buffer<A> column_sums(slices * chunks * program_.padded);
  const Tensor weight = own_.gradient ? gradient_own(column_sums, chunks, damping, type)
                                      : gradient_gemm(column_sums, chunks, damping, type);
  if (with_bias) {
    combine({.parts = {column_sums.data(), program_.padded, accumulation<A>},
             .chunks = slices * chunks,
             .rows = 1,
             .columns = sizes_.outputs,
             .factor = static_cast<A>(damping)},
            arguments_.direction_bias, bias);
  }
  return {weight, bias};
}

template class LastLayer<float>;
template class LastLayer<double>;

}  // namespace fastmeta
