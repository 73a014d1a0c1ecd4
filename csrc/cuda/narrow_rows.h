// The kernel behind per_example_dot and label_gradient: one launch, one pass over the features.
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
        a.out[row] = round_to<T>(value);
      } else if (c < a.outputs) {
        a.out[row * a.outputs + c] = round_to<T>(a.scale * value);
      }
    });
  }
}

// The whole call; out[0] is [N] or [N, C]. False: it is not for this kernel (native.h).
template <RowResult result>
bool run_narrow_rows(const char* name, const LastLayerCall& call, DLTensor* const* out, void* stream) {
  if (!is_narrow(call)) return false;
  const View features = call.operands.features, result_memory = out[0];
  const Launcher launch(name, features.device_index(), stream);
  if (call.sizes.outputs == 0 && result == RowResult::dot) launch.clear(result_memory.data(), result_memory.span());
  if (call.sizes.examples == 0 || call.sizes.outputs == 0) return true;
  with_narrow_type(features, [&](auto zero) {
    using T = decltype(zero);
    NarrowArguments<T> a = narrow_arguments<T>(call);
    const NarrowPlan plan =
        plan_rows(a.examples, a.num_features, a.outputs, a.has_head ? 2 : 1, launch.multiprocessors());
    set_plan(a, plan);
    a.out = static_cast<T*>(result_memory.data());
    with_layout(plan.layout, [&](auto padded, auto lanes) {
      launch(narrow_rows<T, padded(), lanes(), result>,
             {.blocks = dim3(static_cast<unsigned>(plan.blocks)),
              .threads = dim3(32 * narrow_warps),
              .shared_bytes = static_cast<size_t>(plan.shared_bytes())},
             a);
    });
  });
  return true;
}

}  // namespace fastmeta
