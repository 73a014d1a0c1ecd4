// What csrc/cuda/narrow_plan.h decides, for test_cuda_narrow_plan.py.
#include "cuda/narrow_plan.h"

using namespace fastmeta;

extern "C" {

void limits(int64_t* out) {
  const int64_t found[] = {narrow_outputs, narrow_warps, narrow_chunk, narrow_shared, narrow_partials};
  std::copy_n(found, 5, out);
}

// `at_most` blocks a multiprocessor for sums, 0 for rows.
void plan(int at_most, int64_t examples, int64_t features, int64_t outputs, int matrices, int multiprocessors,
          int64_t* out) {
  const NarrowPlan p = at_most > 0 ? plan_gradient(examples, features, outputs, matrices, multiprocessors, at_most)
                                   : plan_rows(examples, features, outputs, matrices, multiprocessors);
  const int64_t found[] = {p.layout.padded, p.layout.lanes,        p.blocks,    p.rows_per_block, p.staged,
                           p.resident,      int64_t{p.row_groups}, p.residuals, p.scratch,        p.shared_bytes()};
  std::copy_n(found, 10, out);
}

void layout(int padded, int lanes, int64_t* out) {
  const NarrowLayout made{padded, lanes};
  const int64_t found[] = {made.rows(),  made.teams(), made.slab(),      made.sums(),       made.spread(),
                           made.count(), made.held(),  made.tile_rows(), made.block_rows(), made.residual_stride()};
  std::copy_n(found, 10, out);
}

int place(int padded, int lanes, int r, int c) { return NarrowLayout{padded, lanes}.place(r, c); }
}
