// conjugate_gradient: (H + damping I) x = rhs for at most 32 outputs, every iteration in one launch. What an iteration
// does to the rows is the kernel of hessian_vector_product; between two of them the blocks of the grid wait for each
// other twice. Every block decides by the same sums, in the same order, so that all stop at the same iteration.
#include "cuda/narrow_gradient.h"

#ifndef FASTMETA_EMULATE
#include <cooperative_groups.h>
#endif

namespace fastmeta {

#ifndef FASTMETA_EMULATE
// Waits for all blocks, and sees what they have written.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }
#endif

namespace {

// The row of numbers, and why it stopped (fastmeta/ops/solve/conjugate_gradient.py).
enum Number { slope_at, squared_at, target_at, count_at, status_at, row_numbers = 8 };
enum Status { running, converged, negative, flat, not_finite };

constexpr int most_resident = 2;  // blocks of a multiprocessor, for which the registers are limited

// Beside the rows and partial sums of NarrowArguments.
struct Solve {
  const float* rhs;      // [C, K]
  const double* target;  // norm of the residual
  float* x;              // [C, K]
  float* residual;       // [C, K]
  float* directions;     // [blocks, C, K]: each has all of it, which spares a barrier
  double* bends;         // [blocks], <p, H p> of their rows
  double* squares;       // [blocks], of their entries of the residual
  double* row;
  int max_iter;
};

// The sum over the threads of a block, to all of them.
__device__ __forceinline__ double block_sum(double value, double* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  __syncthreads();  // what was there has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < narrow_warps; ++w) sum += shared[w];
  return sum;
}

__device__ __forceinline__ Status judged(double squared, double target) {
  if (!(squared < static_cast<double>(HUGE_VAL))) return not_finite;
  return squared <= target ? converged : running;
}

// p^T H p of the block's rows: what its partial sums are in the direction p.
__device__ __forceinline__ double own_bend(const NarrowArguments<float>& a, const float* p, int64_t unknowns,
                                           double* shared) {
  const float* image = partial_weight(a, blockIdx.x, 0);
  double sum = 0;
  for (int64_t e = threadIdx.x; e < unknowns; e += blockDim.x) sum += static_cast<double>(p[e]) * image[e];
  return block_sum(sum, shared);
}

// x += step p and r -= step q for the entries [begin, end), with q = damping p + the sum over all blocks. <r, r> there.
__device__ __forceinline__ double advance(const NarrowArguments<float>& a, const Solve& s, const float* p,
                                          int64_t begin, int64_t end, int64_t unknowns, float step, float* parts,
                                          double* shared) {
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32;
  double square = 0;
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t e = first + lane;
    float sum = 0;
    if (e < end) {
#pragma unroll 4
      for (unsigned block = warp; block < gridDim.x; block += narrow_warps) sum += a.partials[block * unknowns + e];
    }
    __syncthreads();  // what was there has been read
    parts[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp != 0 || e >= end) continue;
    for (int w = 1; w < narrow_warps; ++w) sum += parts[w * 32 + lane];
    s.x[e] += step * p[e];
    const float r = s.residual[e] - step * (sum + a.damping * p[e]);
    s.residual[e] = r;
    square += static_cast<double>(r) * r;
  }
  return block_sum(square, shared);
}

template <int padded, int lanes>
__global__ void __launch_bounds__(32 * narrow_warps, most_resident)
    solve_in_one_launch(FASTMETA_STRUCTURE(NarrowArguments<float>) a, FASTMETA_STRUCTURE(Solve) s) {
  FASTMETA_DYNAMIC_SHARED(float, scratch);
  FASTMETA_SHARED(float, parts, 32 * narrow_warps);
  FASTMETA_SHARED(double, shared, narrow_warps);
  const int64_t unknowns = a.outputs * a.num_features, share = (unknowns + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * share, end = begin + share < unknowns ? begin + share : unknowns;
  float* p = s.directions + blockIdx.x * unknowns;
  const RowTile<float, padded, lanes, RowResult::hessian, true> tile(a, scratch, p);
  const auto sum_over_blocks = [&](const double* values) {
    double sum = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) sum += values[block];
    return block_sum(sum, shared);
  };

  double squared = 0;
  for (int64_t e = threadIdx.x; e < unknowns; e += blockDim.x) {
    const float r = s.rhs[e];
    p[e] = r;
    squared += static_cast<double>(r) * r;
    if (e < begin || e >= end) continue;
    s.x[e] = 0;
    s.residual[e] = r;
  }
  squared = block_sum(squared, shared);
  const double target = *s.target * *s.target;
  double slope = squared, length = squared;  // <r, r> and <p, p>
  Status status = judged(squared, target);
  int count = 0;
  while (status == running && count < s.max_iter) {
    ++count;
    sum_rows(tile, scratch);
    const double bend_here = own_bend(a, p, unknowns, shared);
    if (threadIdx.x == 0) s.bends[blockIdx.x] = bend_here;
    grid_barrier();
    const double bend = sum_over_blocks(s.bends) + static_cast<double>(a.damping) * length;
    if (bend <= 0) {  // NaN passes, so that it reaches x
      status = bend < 0 ? negative : flat;
      break;
    }
    const double square = advance(a, s, p, begin, end, unknowns, static_cast<float>(slope / bend), parts, shared);
    if (threadIdx.x == 0) s.squares[blockIdx.x] = square;
    grid_barrier();
    squared = sum_over_blocks(s.squares);
    const float ratio = static_cast<float>(squared / slope);
    slope = squared;
    status = judged(squared, target);
    if (status != running) break;
    length = 0;
    for (int64_t e = threadIdx.x; e < unknowns; e += blockDim.x) {
      const float next = s.residual[e] + ratio * p[e];
      p[e] = next;
      length += static_cast<double>(next) * next;
    }
    length = block_sum(length, shared);
  }
  if (status == not_finite) {
    for (int64_t e = begin + threadIdx.x; e < end; e += blockDim.x) s.x[e] = NAN;
  }
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  for (int i = 0; i < row_numbers; ++i) s.row[i] = 0;
  s.row[slope_at] = slope;
  s.row[squared_at] = squared;
  s.row[target_at] = target;
  s.row[count_at] = count;
  s.row[status_at] = status;
}

std::tuple<Tensor, Tensor> conjugate_gradient(const Tensor& features, const Tensor& logits,
                                              const std::optional<Tensor>& targets, const std::optional<Tensor>& signs,
                                              const Tensor& rhs, const Tensor& target, int64_t loss_code,
                                              double damping, int64_t max_iter) {
  const Loss loss = check_loss(static_cast<double>(loss_code));
  for (const auto& [tensor, name] : {std::pair{&features, "features"}, {&logits, "logits"}, {&rhs, "rhs"}}) {
    check_plain(*tensor, name, ScalarType::Float, features, "features");
    STD_TORCH_CHECK(tensor->dim() == 2, name, " must be 2-D, got ", shape_of(*tensor));
  }
  const int64_t n = features.size(0), k = features.size(1), c = rhs.size(0);
  STD_TORCH_CHECK(n >= 1 && k >= 1, "features must have rows and columns, got ", shape_of(features));
  STD_TORCH_CHECK(c >= 1 && c <= narrow_outputs, "rhs must have 1 to ", narrow_outputs, " rows, got ", shape_of(rhs));
  check_shape(logits, "logits", "[N, C]", n, c);
  check_shape(rhs, "rhs", "[C, K]", c, k);
  check_plain(target, "target", ScalarType::Double, features, "features");
  STD_TORCH_CHECK(target.numel() == 1, "target must be one number, got ", shape_of(target));
  STD_TORCH_CHECK(std::isfinite(damping) && damping > 0, "damping must be finite and > 0, got ", damping);
  STD_TORCH_CHECK(max_iter >= 0 && max_iter <= INT32_MAX, "max_iter must be in [0, 2^31), got ", max_iter);
  const bool reads = reads_targets(loss, RowFunction::curvature);
  STD_TORCH_CHECK(!reads || targets.has_value(), "targets must be a tensor, got None");

  NarrowArguments<float> a{};
  a.examples = n;
  a.num_features = k;
  a.outputs = static_cast<int>(c);
  a.loss = loss;
  a.padding = static_cast<float>(padding_logit(loss));
  a.scale = 1;
  a.damping = static_cast<float>(damping);
  const auto rows_of = [](const Tensor& tensor, int64_t columns) {
    return Strided<float>{static_cast<const float*>(tensor.const_data_ptr()), columns, 1};
  };
  a.features = rows_of(features, k);
  a.logits = rows_of(logits, c);
  a.tangent.weight = rows_of(rhs, k);  // its strides are those of every direction
  if (reads) {
    check_plain(*targets, "targets", ScalarType::Float, features, "features");
    check_shape(*targets, "targets", "[N, C]", n, c);
    a.targets = rows_of(*targets, c);
  }
  if (signs.has_value()) {
    check_plain(*signs, "signs", ScalarType::Float, features, "features");
    check_vector(*signs, "signs", "[N]", n);
    a.weights = rows_of(*signs, 1);
  }
  const Launcher launch("conjugate_gradient", features);
  const int multiprocessors = launch.multiprocessors();
  a.vectorized = k % 4 == 0 && has_packed_rows(a.features) && has_packed_rows(a.tangent.weight);
  Tensor x = torch::stable::new_empty(rhs, {c, k});
  Tensor row = torch::stable::new_empty(target, {row_numbers});
  with_layout(narrow_layout(n, c, multiprocessors), [&](auto padded, auto lanes) {
    const auto kernel = solve_in_one_launch<padded(), lanes()>;
    Grid grid{.threads = dim3(32 * narrow_warps), .shared_bytes = narrow_shared, .cooperative = true};
    const int resident = std::min(most_resident, launch.resident_blocks(kernel, grid));
    STD_TORCH_CHECK(resident > 0, "conjugate_gradient has no room on this device");
    const NarrowPlan plan = plan_gradient(n, k, c, 1, multiprocessors, resident);
    set_plan(a, plan);
    const int64_t unknowns = c * k, blocks = plan.blocks;
    grid.blocks = dim3(static_cast<unsigned>(blocks));
    grid.shared_bytes = static_cast<size_t>(plan.shared_bytes());
    // A direction starts at a multiple of 16 bytes where vectors are read from it.
    const Tensor sums = torch::stable::new_empty(target, {2 * blocks});
    const Tensor scratch = launch.scratch(unknowns + blocks * (2 * unknowns + c));
    auto* const free = static_cast<float*>(scratch.mutable_data_ptr());
    auto* const bends = static_cast<double*>(sums.mutable_data_ptr());
    a.partials = free + unknowns * (blocks + 1);
    launch(kernel, grid, a,
           Solve{.rhs = static_cast<const float*>(rhs.const_data_ptr()),
                 .target = static_cast<const double*>(target.const_data_ptr()),
                 .x = static_cast<float*>(x.mutable_data_ptr()),
                 .residual = free,
                 .directions = free + unknowns,
                 .bends = bends,
                 .squares = bends + blocks,
                 .row = static_cast<double*>(row.mutable_data_ptr()),
                 .max_iter = static_cast<int>(max_iter)});
  });
  return {x, row};
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("conjugate_gradient", TORCH_BOX(&fastmeta::conjugate_gradient));
}
