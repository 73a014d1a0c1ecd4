// The row kernels, for each instruction set, and the table of those of this processor.
#ifndef FASTMETA_TARGET

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/buffer.h"
#include "cpu/row_program.h"
#include "element_types.h"
#include "loss.h"

#define FASTMETA_KERNELS "cpu/kernels.cpp"
#include "cpu/targets.h"

namespace fastmeta {

template <class A>
const RowKernels<A>& row_kernels() {
  return FASTMETA_BEST(kernels<A>)();
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();

}  // namespace fastmeta

#else

// clang-format off
#include "cpu/convert.h"
#include "cpu/vec.h"
#include "losses.h"
#include "cpu/products.h"
#include "cpu/rows.h"
#include "cpu/columns.h"
// clang-format on

namespace fastmeta::FASTMETA_TARGET {

template <class A>
int64_t whole_vectors(int64_t n) {
  return (n + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// A number of any type; of float16 the instruction is faster than the integer arithmetic.
template <class A, class T>
FASTMETA_INLINE A number_at(const T* p) {
  if constexpr (std::is_same_v<T, Float16>) {
    return widen(Bits16{} + p->bits, T{})[0];
  } else {
    return widen(*p);
  }
}

// A panel holds `most_columns` vectors of rows, a column of the source after the other.
template <class A, class T>
void pack_of(const T* source, int64_t stride, int64_t rows, int64_t padded, int64_t columns, int64_t begin, int64_t end,
             A* packed) {
  const int64_t vectors = padded / lanes<A>;
  for (int64_t k = 0; k < vectors; ++k) {
    const int64_t first = k / most_columns * most_columns, width = panel_vectors(first, vectors) * lanes<A>;
    A* panel = packed + first * lanes<A> * columns + (k - first) * lanes<A>;
    const T* row = source + k * lanes<A> * stride;
    const int64_t count = rows - k * lanes<A> < lanes<A> ? rows - k * lanes<A> : lanes<A>;
    for (int64_t column = begin; column < end; ++column) {
      A* out = panel + column * width;
      for (int64_t r = 0; r < count; ++r) out[r] = number_at<A>(row + r * stride + column);
      for (int64_t r = count; r < lanes<A>; ++r) out[r] = 0;
    }
  }
}

template <class A>
void pack(const Matrix& source, int64_t rows, int64_t padded, int64_t columns, int64_t begin, int64_t end, A* packed) {
  if constexpr (std::is_same_v<A, double>) {
    pack_of<A>(static_cast<const double*>(source.data), source.stride, rows, padded, columns, begin, end, packed);
  } else if (source.element == Element::float32) {
    pack_of<A>(static_cast<const float*>(source.data), source.stride, rows, padded, columns, begin, end, packed);
  } else if (source.element == Element::bfloat16) {
    pack_of<A>(static_cast<const Bfloat16*>(source.data), source.stride, rows, padded, columns, begin, end, packed);
  } else {
    pack_of<A>(static_cast<const Float16*>(source.data), source.stride, rows, padded, columns, begin, end, packed);
  }
}

template <class A>
void widen_row(const Matrix& src, int64_t n, A* dst) {
  load_row<A>(src, 0, n, 0.0, dst);
}

template <class A>
void combine(const Combination<A>& c, int64_t begin, int64_t end) {
  const int64_t padded = whole_vectors<A>(c.columns);
  Buffer<A> scratch(2 * padded);
  A *total = scratch.data(), *part = total + padded;
  for (int64_t row = begin; row < end; ++row) {
    load_row<A>(c.parts, row, c.columns, 0.0, total);
    for (int64_t chunk = 1; chunk < c.chunks; ++chunk) {
      load_row<A>(c.parts, chunk * c.rows + row, c.columns, 0.0, part);
      for (int64_t i = 0; i < padded; i += lanes<A>) store<A>(total + i, load<A>(total + i) + load<A>(part + i));
    }
    if (c.addend) {
      load_row<A>(c.addend, row, c.columns, 0.0, part);
      for (int64_t i = 0; i < padded; i += lanes<A>) {
        store<A>(total + i, c.scale * load<A>(total + i) + c.factor * load<A>(part + i));
      }
    }
    store_row<A>(total, c.columns, c.addend ? A{1} : c.scale, c.out, row);
  }
}

template <class A>
const RowKernels<A>& kernels() {
  static constexpr RowKernels<A> table{lanes<A>,       pack<A>,    widen_row<A>, run_rows<A>,
                                       run_columns<A>, combine<A>, step_rows<A>, step_columns<A>};
  return table;
}

template const RowKernels<float>& kernels<float>();
template const RowKernels<double>& kernels<double>();

}  // namespace fastmeta::FASTMETA_TARGET

#endif
