// The arguments of the kernels for few outputs, and how those of a call become them.
#pragma once

#include "cuda/convert.h"
#include "cuda/narrow_plan.h"
#include "last_layer_call.h"

namespace fastmeta {

// What is made of a row.
enum class RowResult { dot, label_gradient, gradient, hessian };

// Element (i, j) lies at data + i * row + j * column.
template <class T>
struct Strided {
  const T* data = nullptr;
  int64_t row = 0, column = 0;

  __device__ const T* at(int64_t i) const { return data + i * row; }
  __device__ float operator()(int64_t i, int64_t j) const { return widen(data[i * row + j * column]); }
};

// x -> x weight^T + bias.
template <class T>
struct Factor {
  Strided<T> weight;  // [C, D]
  Strided<T> bias;    // [C], or null
};

template <class T>
struct NarrowArguments {
  int64_t examples, num_features;  // N, D
  int outputs;                     // C
  Loss loss;
  float padding;    // a logit beyond C
  bool vectorized;  // four features lie side by side, at an address of their size
  bool has_head;    // logits come from `head`
  bool has_bias;    // the result has one
  bool resident;
  int64_t rows_per_block, staged;
  int row_groups;
  int64_t scratch;
  Strided<T> features;       // [N, D]
  Strided<T> logits;         // [N, C]
  Factor<T> head, tangent;   // logits and their tangent
  Strided<T> targets;        // [N, C], or
  Strided<int64_t> classes;  // [N], or neither
  Strided<T> weights;        // [N], or null
  float scale, damping;
  float* partials;    // [blocks, C, D], then [blocks, C]
  T *out, *out_bias;  // rows: [N] or [N, C]; sums: [C, D] and [C]
};

// Four numbers that one instruction loads.
template <class T>
struct alignas(4 * sizeof(T)) Packed {
  T v[4];
};

template <class T>
Strided<T> strided(const View& tensor) {
  if (!tensor.has_value()) return {};
  return {static_cast<const T*>(tensor.data()), tensor.stride(0), tensor.dim() > 1 ? tensor.stride(1) : 0};
}

template <class T>
bool has_packed_rows(const Strided<T>& matrix) {
  return matrix.column == 1 && matrix.row % 4 == 0 && reinterpret_cast<uintptr_t>(matrix.data) % sizeof(Packed<T>) == 0;
}

template <class T>
NarrowArguments<T> narrow_arguments(const LastLayerCall& call) {
  const LastLayerOperands<View>& x = call.operands;
  NarrowArguments<T> a{};
  a.examples = call.sizes.examples;
  a.num_features = call.sizes.features;
  a.outputs = static_cast<int>(call.sizes.outputs);
  a.loss = call.loss;
  a.padding = static_cast<float>(padding_logit(call.loss));
  a.scale = static_cast<float>(call.scale);
  a.damping = static_cast<float>(call.damping);
  a.has_head = x.head_weight.has_value();
  a.features = strided<T>(x.features);
  a.logits = strided<T>(x.logits);
  a.head = {strided<T>(x.head_weight), strided<T>(x.head_bias)};
  a.tangent = {strided<T>(x.direction_weight), strided<T>(x.direction_bias)};
  a.weights = strided<T>(x.weights);
  if (x.targets.has_value() && x.targets.scalar_type() == ScalarType::Long) {
    a.classes = strided<int64_t>(x.targets);
  } else {
    a.targets = strided<T>(x.targets);
  }
  a.vectorized = a.num_features % 4 == 0 && has_packed_rows(a.features) &&
                 (!x.head_weight.has_value() || has_packed_rows(a.head.weight)) &&
                 (!x.direction_weight.has_value() || has_packed_rows(a.tangent.weight));
  return a;
}

template <class T>
void set_plan(NarrowArguments<T>& a, const NarrowPlan& plan) {
  a.resident = plan.resident;
  a.rows_per_block = plan.rows_per_block;
  a.staged = plan.staged;
  a.row_groups = plan.row_groups;
  a.scratch = plan.scratch;
}

inline bool is_narrow(const LastLayerCall& call) {
  return call.sizes.outputs <= narrow_outputs && call.operands.features.scalar_type() != ScalarType::Double;
}

// Calls f with a zero of the element type.
template <class F>
void with_narrow_type(const View& features, const F& f) {
  switch (features.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(Bfloat16{});
    default:
      return f(Float16{});
  }
}

// Calls f with the layout as constants: padded outputs, lanes.
template <class F>
void with_layout(const NarrowLayout& layout, const F& f) {
  using std::integral_constant;
  if (layout.padded == 16) {
    layout.lanes == 32 ? f(integral_constant<int, 16>(), integral_constant<int, 32>())
                       : f(integral_constant<int, 16>(), integral_constant<int, 8>());
  } else {
    layout.lanes == 32 ? f(integral_constant<int, 32>(), integral_constant<int, 32>())
                       : f(integral_constant<int, 32>(), integral_constant<int, 8>());
  }
}

}  // namespace fastmeta
