#include "last_layer.h"

#include <cstring>

namespace fastmeta {

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class A>
constexpr Element accumulation = sizeof(A) == 8 ? Element::float64 : Element::float32;

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
void PackedRows<A>::pack(const View& weight, Outputs<A>& outputs, A*& place) const {
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

// [C] -> [padded]
template <class A>
void PackedRows<A>::pack_bias(const View& bias, Outputs<A>& outputs, A*& place) const {
  if (!bias.has_value()) return;
  kernels_.widen(matrix_of(bias), program.outputs, place);
  outputs.bias = place;
  place += program.padded;
}

template <class A>
int64_t PackedRows<A>::chunks_of(int64_t rows, int gradients) const {
  const RowProgram<A>& p = program;
  const int64_t lanes_used = p.outputs <= few_outputs ? p.outputs : p.padded;
  const double vectors = static_cast<double>(lanes_used) / kernels_.lanes;
  const double features = static_cast<double>(p.num_features);
  const int products = (p.logits.factor != nullptr) + (p.tangent.factor != nullptr) + gradients;
  return parallel_chunks(rows, static_cast<double>(rows) * vectors * (features * products + 64));
}

template <class A>
void PackedRows<A>::run(const RowProgram<A>& part, int64_t rows, int64_t chunks) const {
  for_chunks(rows, chunks, [&](int64_t begin, int64_t end, int64_t chunk) { kernels_.run(part, begin, end, chunk); });
}

template class PackedRows<float>;
template class PackedRows<double>;

namespace {

template <class A>
void run_gradient(const LastLayerCall& call, PackedRows<A>& rows, DLTensor* const* out) {
  const LastLayerSizes& sizes = call.sizes;
  RowProgram<A>& p = rows.program;
  const int64_t chunks = rows.chunks_of(sizes.examples, 1);
  const Matrix weight = matrix_of(out[0]);
  const A factor = static_cast<A>(call.damping);
  const bool in_place =
      chunks == 1 && factor == 0 && p.padded_features == p.num_features && weight.element == accumulation<A>;
  const Buffer<A> column_sums(chunks * p.padded);
  const Buffer<A> parts(in_place ? 0 : chunks * p.outputs * p.padded_features);
  p.column_sums = column_sums.data();
  p.gradient = in_place ? static_cast<A*>(weight.data) : parts.data();
  rows.run(p, sizes.examples, chunks);
  if (!in_place) {
    run_combination<A>({.parts = {parts.data(), p.padded_features, accumulation<A>},
                        .chunks = chunks,
                        .rows = sizes.outputs,
                        .columns = sizes.features,
                        .addend = factor == 0 ? Matrix{} : matrix_of(call.operands.direction_weight),
                        .factor = factor,
                        .out = weight});
  }
  if (out[1]->shape[0] == 0) return;
  run_combination<A>({.parts = {column_sums.data(), p.padded, accumulation<A>},
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

}  // namespace

bool run_last_layer(const LastLayerCall& call, DLTensor* const* out) {
  if (!has_dense_rows(call.operands) || !OwnProducts(call).all(call.result)) return false;
  if (call.operands.features.scalar_type() == ScalarType::Double) {
    run_own<double>(call, out);
  } else {
    run_own<float>(call, out);
  }
  return true;
}

}  // namespace fastmeta
