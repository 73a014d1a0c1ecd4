// One matrix product of a program, by cuBLASLt.
#pragma once

#include <memory>
#include <mutex>
#include <stdexcept>
#include <type_traits>

#include "cublaslt.h"
#include "program.h"

namespace fastmeta {

// The library has no algorithm for a product as it is wanted.
struct NoSuchProduct : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A matrix of rows x columns entries; one of its strides is 1.
struct MatrixView {
  Address at;
  lt::DataType dtype;
  int64_t rows, columns, row_stride, column_stride;
  uint32_t alignment;  // bytes that the address is known to be a multiple of

  MatrixView transposed() const { return {at, dtype, columns, rows, column_stride, row_stride, alignment}; }
};

// out = alpha a b + beta addend + bias; column_sums = sums over the columns of a. Addresses without memory: absent.
struct ProductArguments {
  MatrixView out, a, b, addend;
  Number alpha, beta;
  Address bias, column_sums;
  uint32_t vector_alignment;  // of bias or column_sums, whichever is given
  bool tf32;
  int device;
};

class ProductStep final : public Step {
 public:
  explicit ProductStep(const ProductArguments& arguments);  // throws NoSuchProduct

  size_t workspace_bytes() const { return workspace_bytes_; }
  void place_workspace(int64_t offset) { workspace_.bytes = offset; }
  void run(const Call& call) const override;

 private:
  template <class Object>
  using Owned = std::unique_ptr<std::remove_pointer_t<Object>, lt::Status (*)(Object)>;

  lt::Handle handle_;
  Owned<lt::MatmulDesc> desc_;
  Owned<lt::Layout> layout_a_, layout_b_, layout_c_, layout_d_;
  lt::Algorithm algorithm_;
  size_t workspace_bytes_;
  Address a_, b_, c_, d_, vector_, workspace_;
  Number alpha_, beta_;
  mutable std::mutex vector_in_use_;  // guards desc_, which holds the address of bias or column_sums
};

}  // namespace fastmeta
