// The kernel behind per_example_dot_narrow and label_gradient_narrow: one launch, one pass over the features.
#pragma once

#include "cuda/narrow.h"

namespace fastmeta {

template <class T, int padded, int lanes, RowResult result>
__global__ void __launch_bounds__(32 * narrow_warps, lanes == 32 ? 4 : 3)
    narrow_rows(FASTMETA_STRUCTURE(NarrowArguments<T>) a) {
  FASTMETA_DYNAMIC_SHARED(float, factors);
  using Tile = RowTile<T, padded, lanes, result>;
  const Tile tile(a, factors);
  const int64_t begin = blockIdx.x * a.rows_per_block;
  const int64_t end = begin + a.rows_per_block < a.examples ? begin + a.rows_per_block : a.examples;
  tile.stage_resident();
  for (int64_t first = begin; first < end; first += Tile::block_rows) {
    tile.run(first + tile.warp * Tile::tile_rows, end, [&](int64_t row, int c, float value) {
      if constexpr (result == RowResult::dot) {
        a.out[row] = narrow<T>(value);
      } else if (c < a.outputs) {
        a.out[row * a.outputs + c] = narrow<T>(a.scale * value);
      }
    });
  }
}

// Fills `out`: [N] or [N, C].
template <RowResult result, class T>
void run_narrow_rows(const char* name, NarrowArguments<T> a, const Tensor& out) {
  if (a.examples == 0 || a.outputs == 0) return;
  const Launcher launch(name, out);
  const NarrowPlan plan =
      plan_rows(a.examples, a.num_features, a.outputs, a.has_head ? 2 : 1, launch.multiprocessors());
  set_plan(a, plan);
  a.out = static_cast<T*>(out.mutable_data_ptr());
  with_layout(plan.layout, [&](auto padded, auto lanes) {
    launch(narrow_rows<T, padded(), lanes(), result>,
           {.blocks = dim3(static_cast<unsigned>(plan.blocks)),
            .threads = dim3(32 * narrow_warps),
            .shared_bytes = static_cast<size_t>(plan.shared_bytes())},
           a);
  });
}

}  // namespace fastmeta
