// One call of a last-layer operator on memory: a single pass over the rows that multiplies as it goes. What needs
// torch's GEMM, or a copy first, is in last_layer_tensors.h.
#pragma once

#include "../last_layer_call.h"
#include "buffer.h"
#include "tensors.h"

namespace fastmeta {

// Which products the row engine does itself, and which are torch's GEMM. Crossovers measured on Zen 5: with AVX-512 the
// engine multiplies twice as fast as torch's GEMM, with AVX2 as fast, with 128-bit vectors less than half as fast, so
// that only the saved calls speak for it. Its sum of outer products needs each thread's [C, D] in the second-level
// cache; a larger factor needs rows enough to pay for packing it. bfloat16 instructions multiply three times as fast.
struct OwnProducts {
  bool forward, gradient;

  OwnProducts(const LastLayerSizes& sizes, ScalarType type);
  explicit OwnProducts(const LastLayerCall& call) : OwnProducts(call.sizes, call.operands.features.scalar_type()) {}
  bool all(LastLayerResult result) const { return result == LastLayerResult::gradient ? gradient : forward; }
};

// The whole call; out[j] is the operator's j-th result (native.h).
// False: a product is torch's GEMM's, or the rows of an operand are not dense; nothing has been written.
bool run_last_layer(const LastLayerCall& call, DLTensor* const* out);

// The program of a call, and what it points to beside the operands: packed factors and biases.
template <class A>
class PackedRows {
 public:
  RowProgram<A> program;

  // Throws where a class is out of range. Rows of operands are dense, but for example weights and, without
  // `multiplies`, features.
  PackedRows(const LastLayerCall& call, bool multiplies);
  // Rows [0, rows) of a program, this one or one like it.
  void run(const RowProgram<A>& program, int64_t rows, int64_t chunks) const;
  int64_t chunks_of(int64_t rows, int gradients = 0) const;

 private:
  static int64_t packed_size(const LastLayerCall& call, bool multiplies);
  void pack(const View& weight, Outputs<A>& outputs, A*& place) const;
  void pack_bias(const View& bias, Outputs<A>& outputs, A*& place) const;

  const RowKernels<A>& kernels_;
  const Buffer<A> packed_;
};

}  // namespace fastmeta
