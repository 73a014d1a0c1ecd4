// One call of a last-layer operator: a small head in a single pass over the rows, a large one as torch's GEMM with one
// fused pass before or after it.
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
  std::optional<Tensor> tangent;                 // [N, C] in place of a direction, small heads only
};

// Whether a pass of our own over the rows beats torch's GEMM and a row pass.
template <class A>
bool is_small_head(int64_t outputs) {
  return outputs <= 8 * row_kernels<A>().lanes;
}

// A is the type of accumulation, float or double. One object serves one call of one of the three results.
template <class A>
class LastLayer {
 public:
  LastLayer(const LastLayerSizes& sizes, LastLayerArguments arguments, Loss loss, RowFunction function);

  Tensor dots();                                                        // [N]: <row, tangent>
  Tensor rows(double scale);                                            // [N, C]: scale * row
  std::tuple<Tensor, Tensor> gradient(bool with_bias, double damping);  // [C, D], and [C] or [0]

 private:
  // Some rows of a large head, with the products that stand in for what the program lacks.
  struct Slice {
    RowProgram<A> program;
    Tensor features;
    std::optional<Tensor> logits, tangent;
    int64_t rows;
  };

  Matrix read(const Tensor& tensor);
  const A* pack(const Tensor& weight);
  const A* pack_bias(const std::optional<Tensor>& bias);
  void pack_factors();
  int64_t slice_rows() const;
  Slice slice(int64_t first, int64_t rows, const Tensor& features) const;
  int64_t chunks_of(int64_t rows, int gradients = 0) const;
  void run(const RowProgram<A>& program, int64_t rows, int64_t chunks) const;
  void run_all();
  Tensor gradient_small(const Buffer<A>& column_sums, int64_t chunks, double damping);
  Tensor gradient_large(const Buffer<A>& column_sums, int64_t chunks, double damping);
  void combine(Combination<A> combination, const std::optional<Tensor>& addend, const Tensor& out) const;

  const LastLayerSizes sizes_;
  const LastLayerArguments arguments_;
  const RowKernels<A>& kernels_;
  RowProgram<A> program_;
  bool small_ = false;
  std::vector<Tensor> kept_;       // what the program's matrices point to
  std::vector<Buffer<A>> packed_;  // and its factors and biases
};

}  // namespace fastmeta
