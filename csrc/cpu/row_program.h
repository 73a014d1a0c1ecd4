// What the row engine (rows.h) is asked to do: operands, a row function, and where the rows go.
#pragma once

#include <cstdint>

#include "../loss.h"

namespace fastmeta {

constexpr int few_outputs = 16;  // up to this C a lane is a row (columns.h), above it an output (rows.h)

enum class Element : int { float32, bfloat16, float16, float64 };

// A matrix in memory with unit inner stride; a vector is a matrix with one column.
struct Matrix {
  void* data = nullptr;  // [rows, columns]
  int64_t stride = 0;    // elements from row to row
  Element element = Element::float32;

  explicit operator bool() const { return data != nullptr; }

  // The matrix without its first rows.
  Matrix from(int64_t row) const {
    const int64_t size = element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
    return {data == nullptr ? nullptr : static_cast<char*>(data) + row * stride * size, stride, element};
  }
};

// Rows of C outputs, logits or their tangent: read from memory, or computed as features times a factor.
template <class A>
struct OutputRows {
  Matrix rows;                // [N, C], or null
  const A* factor = nullptr;  // [D, padded] in panels of vectors (products.h), or for few outputs [C, D]; or null
  int64_t factor_stride = 0;  // elements from row to row of [C, D]
  const A* bias = nullptr;    // [padded], added; or null
};

// A is the type of accumulation, float or double.
template <class A>
struct RowProgram {
  RowFunction function = RowFunction::residual;
  Loss loss{};
  int64_t outputs = 0;          // C
  int64_t padded = 0;           // C rounded up to whole vectors
  int64_t num_features = 0;     // D
  int64_t padded_features = 0;  // D rounded up to whole vectors
  Matrix features;              // [N, D], read if there is a factor or a gradient

  OutputRows<A> logits;              // [N, C]
  OutputRows<A> tangent;             // [N, C]; not read by last_layer_gradient
  Matrix targets;                    // [N, C], or
  const int64_t* classes = nullptr;  // [N]
  Matrix weights;                    // [N], or null

  // Any of these may be absent.
  Matrix dots;               // [N]: <row, tangent>
  Matrix rows;               // [N, C]: scale * row
  A scale = 1;               //
  A* gradient = nullptr;     // [chunks, C, padded_features]: sum over the chunk of row^T features
  A* column_sums = nullptr;  // [chunks, padded]: sum over the chunk of the rows
};

// out [rows, columns] = scale * sum over chunks of parts [chunks * rows, columns] + factor * addend [rows, columns].
// Chunks are added in order, so the result does not depend on which thread finished first.
template <class A>
struct Combination {
  Matrix parts;
  int64_t chunks = 1;
  int64_t rows = 0;
  int64_t columns = 0;
  A scale = 1;
  Matrix addend;  // or null
  A factor = 0;
  Matrix out;
};

// out [N, C] = labels - step * (softmax(plus) - softmax(minus)), projected to the simplex if asked.
template <class A>
struct FiniteDifferenceStep {
  Matrix plus, minus, labels, out;  // [N, C]
  int64_t outputs = 0;              // C
  A step = 0;
  bool project = true;
};

// The kernels compiled for one instruction set.
template <class A>
struct RowKernels {
  int lanes;
  // A factor of OutputRows from source [rows, columns], for columns [begin, end); 0 beyond the rows.
  void (*pack)(const Matrix& source, int64_t rows, int64_t padded, int64_t columns, int64_t begin, int64_t end,
               A* packed);
  // dst [n rounded up to whole vectors] = row 0 of src [1, n], 0 beyond n.
  void (*widen)(const Matrix& src, int64_t n, A* dst);
  // Each runs rows [begin, end) as chunk `chunk`, which owns a slice of the gradient and of the column sums. The second
  // is for at most `few_outputs`.
  void (*run_rows)(const RowProgram<A>& program, int64_t begin, int64_t end, int64_t chunk);
  void (*run_columns)(const RowProgram<A>& program, int64_t begin, int64_t end, int64_t chunk);
  void (*combine)(const Combination<A>& combination, int64_t begin, int64_t end);
  void (*step_rows)(const FiniteDifferenceStep<A>& step, int64_t begin, int64_t end);
  void (*step_columns)(const FiniteDifferenceStep<A>& step, int64_t begin, int64_t end);
};

// The kernels of this processor's best instruction set.
template <class A>
const RowKernels<A>& row_kernels();

}  // namespace fastmeta
