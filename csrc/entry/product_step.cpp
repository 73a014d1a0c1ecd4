#include "product_step.h"

#include <optional>
#include <string>

// cuBLASLt's matrices are columns at a distance (the leading dimension). A matrix whose rows are dense is, to it, the
// transposed one. Ours are written with dense rows as a rule, so that what is asked for is out^T = b^T a^T; the sums
// over the columns of a are then the "bias gradient" of its second operand (BGRADB), and of its first otherwise
// (BGRADA).

namespace fastmeta {

namespace {

constexpr uint64_t most_workspace_bytes = 32 << 20;  // what NVIDIA recommends for sm_90

void check(lt::Status status, const char* what) {
  if (status != 0) throw NoSuchProduct(std::string("cuBLASLt: ") + what + " failed, status " + std::to_string(status));
}

// The leading dimension of a matrix as columns at a distance, if it is one. Along a side of length 1 any stride will
// do.
std::optional<int64_t> leading(const MatrixView& matrix) {
  const bool dense = matrix.row_stride == 1 || matrix.rows == 1;
  if (matrix.columns == 1 && dense) return matrix.rows;
  if (!dense || matrix.column_stride < matrix.rows) return std::nullopt;
  return matrix.column_stride;
}

struct Operand {
  lt::Operation operation;
  uint64_t rows, columns;
  int64_t leading;
};

Operand operand(const MatrixView& matrix) {
  const auto rows = static_cast<uint64_t>(matrix.rows), columns = static_cast<uint64_t>(matrix.columns);
  if (const auto found = leading(matrix)) return {lt::as_it_is, rows, columns, *found};
  if (const auto found = leading(matrix.transposed())) return {lt::transposed, columns, rows, *found};
  throw NoSuchProduct("neither rows nor columns of an operand are dense");
}

lt::Layout layout(const MatrixView& matrix, const Operand& as) {
  lt::Layout made = nullptr;
  check(lt::library()->layout_create(&made, matrix.dtype, as.rows, as.columns, as.leading), "a layout");
  return made;
}

bool is_given(const Address& address) { return address.base != Address::Base::null; }

template <class Value>
void set(lt::MatmulDesc desc, lt::DescAttribute attribute, const Value& value) {
  check(lt::library()->matmul_desc_set(desc, attribute, &value, sizeof value), "an attribute");
}

template <class Value>
void set(lt::Preference preference, int attribute, const Value& value) {
  const auto which = static_cast<lt::PreferenceAttribute>(attribute);
  check(lt::library()->preference_set(preference, which, &value, sizeof value), "a preference");
}

}  // namespace

ProductStep::ProductStep(const ProductArguments& arguments)
    : desc_(nullptr, nullptr),
      layout_a_(nullptr, nullptr),
      layout_b_(nullptr, nullptr),
      layout_c_(nullptr, nullptr),
      layout_d_(nullptr, nullptr),
      alpha_(arguments.alpha),
      beta_(arguments.beta) {
  const lt::Library* library = lt::library();
  if (!library) throw NoSuchProduct("cuBLASLt is not loaded");
  handle_ = lt::handle(arguments.device);
  const bool adds = is_given(arguments.addend.at);
  const bool by_rows = leading(arguments.out.transposed()) && (!adds || leading(arguments.addend.transposed()));
  const MatrixView a = by_rows ? arguments.b.transposed() : arguments.a;
  const MatrixView b = by_rows ? arguments.a.transposed() : arguments.b;
  const MatrixView d = by_rows ? arguments.out.transposed() : arguments.out;
  const MatrixView c = !adds ? d : by_rows ? arguments.addend.transposed() : arguments.addend;
  if (!leading(d) || !leading(c)) throw NoSuchProduct("the addend is not dense along the same side as the result");
  if (!adds) beta_ = {-1, 0.0};

  lt::MatmulDesc desc = nullptr;
  const lt::ComputeType compute = arguments.tf32 ? lt::compute_32f_tf32 : lt::compute_32f;
  check(library->matmul_desc_create(&desc, compute, lt::float32), "a descriptor");
  desc_ = {desc, library->matmul_desc_destroy};
  const Operand as_a = operand(a), as_b = operand(b);
  set(desc, lt::trans_a, static_cast<int32_t>(as_a.operation));
  set(desc, lt::trans_b, static_cast<int32_t>(as_b.operation));
  const auto as_d = Operand{lt::as_it_is, static_cast<uint64_t>(d.rows), static_cast<uint64_t>(d.columns), *leading(d)};
  auto as_c = as_d;
  as_c.leading = *leading(c);
  layout_a_ = {layout(a, as_a), library->layout_destroy};
  layout_b_ = {layout(b, as_b), library->layout_destroy};
  layout_c_ = {layout(c, as_c), library->layout_destroy};
  layout_d_ = {layout(d, as_d), library->layout_destroy};
  a_ = a.at;
  b_ = b.at;
  c_ = c.at;
  d_ = d.at;

  lt::Epilogue after = lt::plain;
  if (is_given(arguments.bias)) {
    if (!by_rows || is_given(arguments.column_sums)) throw NoSuchProduct("no epilogue adds this bias");
    after = lt::bias;
    vector_ = arguments.bias;
  } else if (is_given(arguments.column_sums)) {
    after = by_rows ? lt::sums_of_b : lt::sums_of_a;
    vector_ = arguments.column_sums;
  }
  set(desc, lt::epilogue, static_cast<uint32_t>(after));
  if (after != lt::plain) {
    // The heuristic reads the alignment off this address, and nothing behind it.
    set(desc, lt::bias_pointer, reinterpret_cast<void*>(static_cast<uintptr_t>(arguments.vector_alignment)));
  }

  lt::Preference made = nullptr;
  check(library->preference_create(&made), "a preference");
  const Owned<lt::Preference> preference(made, library->preference_destroy);
  set(made, lt::max_workspace_bytes, most_workspace_bytes);
  set(made, lt::reduction_scheme_mask, lt::reduce_in_compute_type);
  set(made, lt::min_alignment_a, a.alignment);
  set(made, lt::min_alignment_a + 1, b.alignment);
  set(made, lt::min_alignment_a + 2, c.alignment);
  set(made, lt::min_alignment_a + 3, d.alignment);
  lt::Heuristic best{};
  int found = 0;
  const lt::Status status = library->heuristic(handle_, desc, layout_a_.get(), layout_b_.get(), layout_c_.get(),
                                               layout_d_.get(), made, 1, &best, &found);
  if (status != 0 || found < 1 || best.state != 0) throw NoSuchProduct("cuBLASLt has no algorithm for this product");
  algorithm_ = best.algorithm;
  workspace_bytes_ = best.workspace_bytes;
  if (workspace_bytes_ > 0) workspace_.base = Address::Base::scratch;
}

void ProductStep::run(const Call& call) const {
  const auto alpha = static_cast<float>(alpha_.in(call.numbers)), beta = static_cast<float>(beta_.in(call.numbers));
  std::unique_lock<std::mutex> lock;
  if (is_given(vector_)) {
    lock = std::unique_lock(vector_in_use_);
    set(desc_.get(), lt::bias_pointer, call.at(vector_));
  }
  const lt::Status status = lt::library()->matmul(
      handle_, desc_.get(), &alpha, call.at(a_), layout_a_.get(), call.at(b_), layout_b_.get(), &beta, call.at(c_),
      layout_c_.get(), call.at(d_), layout_d_.get(), &algorithm_, call.at(workspace_), workspace_bytes_, call.stream);
  if (status != 0) throw std::runtime_error("cuBLASLt refuses a product, status " + std::to_string(status));
}

}  // namespace fastmeta
