// How the kernels for few outputs (narrow.h) cut their work: host arithmetic alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define FASTMETA_PLAN_FUNCTION __host__ __device__
#else
#define FASTMETA_PLAN_FUNCTION
#endif

namespace fastmeta {

constexpr int narrow_outputs = 32;            // most of them
constexpr int narrow_warps = 4;               // of a block
constexpr int64_t narrow_chunk = 128;         // rows whose residuals a block holds
constexpr int64_t narrow_shared = 48 * 1024;  // most bytes of dynamic memory
constexpr int64_t narrow_partials = 1 << 24;  // most floats of partial sums

// A row of `features` is read by `lanes` lanes, four features each: a slab. Each lane multiplies `rows` rows with all
// `padded` outputs, so that what it reads of the factor serves as many rows; then the lanes add up, and each keeps
// `count` outputs of `held` rows. A row is spread over `spread` lanes.
struct NarrowLayout {
  int padded, lanes;

  FASTMETA_PLAN_FUNCTION constexpr int rows() const { return lanes == 32 ? 32 / padded : 64 / padded; }
  FASTMETA_PLAN_FUNCTION constexpr int teams() const { return 32 / lanes; }
  FASTMETA_PLAN_FUNCTION constexpr int slab() const { return 4 * lanes; }
  FASTMETA_PLAN_FUNCTION constexpr int sums() const { return rows() * padded; }
  FASTMETA_PLAN_FUNCTION constexpr int spread() const { return lanes < padded ? lanes : padded; }
  FASTMETA_PLAN_FUNCTION constexpr int count() const { return padded / spread(); }
  FASTMETA_PLAN_FUNCTION constexpr int held() const { return rows() * spread() / lanes; }
  FASTMETA_PLAN_FUNCTION constexpr int tile_rows() const { return rows() * teams(); }
  FASTMETA_PLAN_FUNCTION constexpr int block_rows() const { return tile_rows() * narrow_warps; }
  // Which of a lane's sums is row r, output c: the lane that keeps it in the upper bits.
  FASTMETA_PLAN_FUNCTION constexpr int place(int r, int c) const {
    return lanes == 32 ? r * padded + c : ((c / count()) * rows() + r) * count() + c % count();
  }
  // Floats between two rows of residuals: lanes that read different rows meet different banks.
  FASTMETA_PLAN_FUNCTION constexpr int residual_stride() const { return padded + 4; }
};

struct NarrowPlan {
  NarrowLayout layout;
  int64_t blocks, rows_per_block;
  int64_t staged;              // features of a factor in shared memory at a time
  bool resident;               // all of every factor stays there
  int row_groups;              // warps that share the rows of one slab when residuals meet features
  int64_t residuals, scratch;  // floats: of residuals, and of factors or sums of other warps

  int64_t shared_bytes() const { return (residuals + scratch) * int64_t{sizeof(float)}; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One warp for one or two rows while there are few of them, for latency; 16 or 8 rows a warp when they are enough to
// fill every multiprocessor, for fewer shuffles and fewer reads of the factors.
constexpr NarrowLayout narrow_layout(int64_t examples, int64_t outputs, int multiprocessors) {
  return {outputs <= 16 ? 16 : 32, examples >= int64_t{64} * multiprocessors ? 8 : 32};
}

// Shared memory for `matrices` factors [C, D].
constexpr void stage_factors(NarrowPlan& plan, int64_t features, int64_t outputs, int matrices, int64_t floats) {
  const int64_t slab = plan.layout.slab(), all = round_up(features, slab);
  plan.resident = matrices * outputs * all <= floats;
  plan.staged = plan.resident ? all : floats / (outputs * slab) * slab;
  plan.scratch = (plan.resident ? matrices : 1) * outputs * plan.staged;
}

// One result for each row: four blocks a multiprocessor, each with rows of its own.
constexpr NarrowPlan plan_rows(int64_t examples, int64_t features, int64_t outputs, int matrices, int multiprocessors) {
  NarrowPlan plan{.layout = narrow_layout(examples, outputs, multiprocessors)};
  plan.rows_per_block = round_up(ceil_div(examples, int64_t{4} * multiprocessors), plan.layout.block_rows());
  plan.blocks = ceil_div(examples, std::max<int64_t>(1, plan.rows_per_block));
  stage_factors(plan, features, outputs, matrices, narrow_shared / int64_t{sizeof(float)});
  return plan;
}

// Sums over rows: a block's rows give one partial sum [C, D] and [C], and one block needs no second launch. Rows per
// block grow to 128 before there is more than one block for each multiprocessor, and beyond once there are `at_most`.
constexpr NarrowPlan plan_gradient(int64_t examples, int64_t features, int64_t outputs, int matrices,
                                   int multiprocessors, int at_most = 4) {
  NarrowPlan plan{.layout = narrow_layout(examples, outputs, multiprocessors)};
  const int64_t most =
      std::clamp<int64_t>(narrow_partials / (outputs * (features + 1)), 1, int64_t{at_most} * multiprocessors);
  int64_t rows = examples <= 32 ? 32 : std::min(ceil_div(examples, multiprocessors), narrow_chunk);
  rows = std::max(rows, ceil_div(examples, most));
  plan.rows_per_block = round_up(rows, plan.layout.block_rows());
  plan.blocks = ceil_div(examples, plan.rows_per_block);
  plan.residuals = std::min(plan.rows_per_block, narrow_chunk) * plan.layout.residual_stride();
  stage_factors(plan, features, outputs, matrices, narrow_shared / int64_t{sizeof(float)} - plan.residuals);
  const int64_t slabs = ceil_div(features, plan.layout.slab());
  plan.row_groups = slabs >= 4 ? 1 : slabs >= 2 ? 2 : 4;
  // 16 outputs x 4 features of two warps, after the teams of a warp have added up.
  if (plan.row_groups > 1) plan.scratch = std::max<int64_t>(plan.scratch, int64_t{2} * 32 * 64 / plan.layout.teams());
  return plan;
}

}  // namespace fastmeta
