// One call of a last-layer operator: a single pass over the rows that multiplies as it goes, or one fused pass before
// or after torch's GEMM.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "buffer.h"
#include "tensors.h"

namespace fastmeta {

struct LastLayerArguments {
  Tensor features;                               // [N, D]
  std::optional<Tensor> logits;                  // [N, C], or
  std::optional<Tensor> head_weight, head_bias;  // [C, D], [C]
  std::optional<Tensor> targets;                 // [N, C] or int64 [N]
  std::optional<Tensor> weights;                 // [N]
  std::optional<Tensor> direction_weight;        // [C, D]
  std::optional<Tensor> direction_bias;          // [C]
  std::optional<Tensor> tangent;                 // [N, C] in place of a direction
};

// Which products the row engine does itself, and which are torch's GEMM. Crossovers measured on Zen 5: with AVX-512 the
// engine multiplies twice as fast as torch's GEMM, with AVX2 as fast, with 128-bit vectors less than half as fast, so
// that only the saved calls speak for it. Its sum of outer products needs each thread's [C, D] in the second-level
// cache; a larger factor needs rows enough to pay for packing it. bfloat16 instructions multiply three times as fast.
template <class A>
struct OwnProducts {
  bool forward, gradient;

  OwnProducts(const LastLayerSizes& sizes, const Tensor& features) {
    const int64_t lanes = row_kernels<A>().lanes;
    const int64_t factor = sizes.features * ((sizes.outputs + lanes - 1) / lanes * lanes);
    const bool few = sizes.outputs <= 16;
    const bool cached = isa() != Isa::baseline && factor * static_cast<int64_t>(sizeof(A)) <= 1 << 20;
    if (features.scalar_type() == ScalarType::BFloat16 && has_bfloat16_products()) {
      forward = gradient = (few || cached) && sizes.examples * factor <= 2'000'000;
    } else {
      gradient = few || cached;
      forward = gradient || (isa() == Isa::avx512 && sizes.examples >= 256);
    }
  }
};

// A is the type of accumulation, float or double. One object serves one call of one of the three results.
template <class A>
class LastLayer {
 public:
  LastLayer(const LastLayerSizes& sizes, LastLayerArguments arguments, Loss loss, RowFunction function);

  Tensor dots();              // [N]: <row, tangent>
  Tensor rows(double scale);  // [N, C]: scale * row
  // [C, D], [C] or [0]: row^T features and the sum of the rows, plus damping times the direction; in the features'
  // dtype or another.
  std::tuple<Tensor, Tensor> gradient(bool with_bias, double damping, std::optional<ScalarType> as = std::nullopt);

 private:
  // Some rows, with torch's products for what the program does not multiply itself.
  struct Slice {
    RowProgram<A> program;
    Tensor features;
    std::optional<Tensor> logits, tangent;
    int64_t rows;
  };

  Matrix read(const Tensor& tensor);
  const A* pack(const Tensor& weight);
  const A* pack_bias(const std::optional<Tensor>& bias);

  int64_t slice_rows() const;
  Slice slice(int64_t first, int64_t rows, const Tensor& features) const;
  int64_t chunks_of(int64_t rows, int gradients = 0) const;
  void run(const RowProgram<A>& program, int64_t rows, int64_t chunks) const;
  void run_all();
  Tensor gradient_own(const Buffer<A>& column_sums, int64_t chunks, double damping, ScalarType type);
  Tensor gradient_gemm(const Buffer<A>& column_sums, int64_t chunks, double damping, ScalarType type);
  void combine(Combination<A> combination, const std::optional<Tensor>& addend, const Tensor& out) const;

  const LastLayerSizes sizes_;
  const LastLayerArguments arguments_;
  const RowKernels<A>& kernels_;
  RowProgram<A> program_;
  OwnProducts<A> own_;
  std::vector<Tensor> kept_;       // what the program's matrices point to
  std::vector<Buffer<A>> packed_;  // and its factors and biases
};

}  // namespace fastmeta
