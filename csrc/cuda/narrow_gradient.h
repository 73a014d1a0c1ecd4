// The kernels behind last_layer_gradient and hessian_vector_product: sums over rows of an outer product.
// Each block turns its rows into residuals in shared memory, multiplies them with the same rows' features, and leaves
// one partial sum; a second launch adds these up in a fixed order. A single block writes the result itself.
#pragma once

#include "cuda/narrow.h"

namespace fastmeta {

constexpr int sum_outputs = 16;  // outputs x four features: what a lane sums

// The partial sums of a block: weight [C, D] of every block, then bias [C] of every block.
template <class T>
__device__ __forceinline__ float* partial_weight(const NarrowArguments<T>& a, int64_t block, int c) {
  return a.partials + (block * a.outputs + c) * a.num_features;
}

template <class T>
__device__ __forceinline__ float* partial_bias(const NarrowArguments<T>& a, int64_t blocks, int64_t block) {
  return a.partials + blocks * a.outputs * a.num_features + block * a.outputs;
}

// Entries of the result: weight [C, D], then bias [C]. sum + damping * direction.
template <class T>
__device__ __forceinline__ void write_entry(const NarrowArguments<T>& a, int64_t entry, float sum) {
  const int64_t in_weight = a.outputs * a.num_features;
  if (entry < in_weight) {
    if (a.damping != 0) sum += a.damping * a.tangent.weight(entry / a.num_features, entry % a.num_features);
    a.out[entry] = round_to<T>(sum);
  } else if (a.has_bias) {
    if (a.damping != 0) sum += a.damping * a.tangent.bias(entry - in_weight, 0);
    a.out_bias[entry - in_weight] = round_to<T>(sum);
  }
}

// Residuals times features for one chunk of a block's rows.
template <class T, int padded, int lanes>
struct OuterProducts {
  static constexpr NarrowLayout layout{padded, lanes};
  static constexpr int teams = layout.teams(), slab_features = layout.slab(), stride = layout.residual_stride();
  static constexpr int kept = sum_outputs / teams;  // outputs of a lane once the teams have added up
  using Sums = float[sum_outputs * 4];              // [output][feature], then the first `kept` of them

  const NarrowArguments<T>& a;
  const float* residuals;  // shared, [rows, stride]
  float* scratch;          // shared
  int64_t first;           // row
  int rows;
  bool starts;  // the block's sums
  int warp, lane;

  // For all threads of the block.
  __device__ void run() const {
    sum_bias();
    const int groups = a.row_groups, slabs_at_once = narrow_warps / groups;
    const int64_t slabs = (a.num_features + slab_features - 1) / slab_features;
    for (int64_t base = 0; base < slabs; base += slabs_at_once) {
      const int64_t slab = base + warp / groups;
#pragma unroll 1
      for (int c = 0; c < padded; c += sum_outputs) {
        if (c >= a.outputs) break;
        Sums sums;
#pragma unroll
        for (int i = 0; i < sum_outputs * 4; ++i) sums[i] = 0;
        if (slab < slabs) multiply(slab, c, warp % groups, sums);
        scatter_sum<16, lanes, sum_outputs * 4>(sums, lane);
        add_groups(sums);
        if (slab < slabs && warp % groups == 0) save(slab, c, sums);
      }
    }
  }

 private:
  // Each warp takes some outputs, each lane some rows.
  __device__ void sum_bias() const {
    for (int c = warp; c < a.outputs; c += narrow_warps) {
      float sum = 0;
      for (int row = lane; row < rows; row += 32) sum += residuals[row * stride + c];
      sum = LaneReduce<32>().sum(sum);
      if (lane != 0) continue;
      float* partial = partial_bias(a, gridDim.x, blockIdx.x) + c;
      *partial = starts ? sum : *partial + sum;
    }
  }

  __device__ __forceinline__ void multiply(int64_t slab, int c, int group, Sums& sums) const {
    const int step = a.row_groups * teams;
    const auto load = [&](int row) {
      return load_quad<lanes>(a.features.at(first + row), a.features.column, slab * slab_features, lane % lanes,
                              a.num_features, a.vectorized);
    };
    int row = group * teams + lane / lanes;
    Quad next = row < rows ? load(row) : Quad{};
    for (; row < rows; row += step) {
      const Quad h = next;
      if (row + step < rows) next = load(row + step);
#pragma unroll
      for (int j = 0; j < sum_outputs; j += 4) {
        if (c + j >= a.outputs) break;
        const Quad r = read_quad(residuals + row * stride + c + j);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[(j + m) * 4 + i] += r.v[m] * h.v[i];
        }
      }
    }
  }

  // The sums of the warps that share a slab, to the first of them. For all threads of the block.
  __device__ __forceinline__ void add_groups(Sums& sums) const {
    const int group = warp % a.row_groups, slab = warp / a.row_groups;
    for (int half = a.row_groups / 2; half > 0; half /= 2) {
      float* shared = scratch + ((slab * half + group % half) * kept * 32 + lane) * 4;
      __syncthreads();  // what was there has been read
      if (group >= half && group < 2 * half) {
#pragma unroll
        for (int m = 0; m < kept; ++m) {
          write_quad(shared + m * 128, quad_of(sums, m));
        }
      }
      __syncthreads();
      if (group < half) {
#pragma unroll
        for (int m = 0; m < kept; ++m) {
          const Quad other = read_quad(shared + m * 128);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[4 * m + i] += other.v[i];
        }
      }
    }
  }

  __device__ __forceinline__ void save(int64_t slab, int first_output, const Sums& sums) const {
#pragma unroll
    for (int m = 0; m < kept; ++m) {
      const int c = first_output + lane / lanes * kept + m;
      if (c >= a.outputs) break;
      float* partial = partial_weight(a, blockIdx.x, c);
      if (a.vectorized) {
        const int64_t d = slab * slab_features + 4 * (lane % lanes);
        if (d >= a.num_features) return;
        Quad sum = quad_of(sums, m);
        if (!starts) {
          const Quad before = read_quad(partial + d);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.v[i] += before.v[i];
        }
        write_quad(partial + d, sum);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t d = slab * slab_features + lane % lanes + lanes * i;
          if (d < a.num_features) partial[d] = starts ? sums[4 * m + i] : partial[d] + sums[4 * m + i];
        }
      }
    }
  }

  static __device__ __forceinline__ Quad quad_of(const Sums& sums, int m) {
    return {sums[4 * m], sums[4 * m + 1], sums[4 * m + 2], sums[4 * m + 3]};
  }
};

// The partial sums of a block's rows. For all threads of the block.
template <class T, int padded, int lanes, RowResult result, bool own_direction>
__device__ __forceinline__ void sum_rows(const RowTile<T, padded, lanes, result, own_direction>& tile, float* scratch) {
  using Tile = RowTile<T, padded, lanes, result, own_direction>;
  constexpr int stride = Tile::layout.residual_stride();
  const NarrowArguments<T>& a = tile.a;
  float* residuals = scratch + a.scratch;
  const int64_t begin = blockIdx.x * a.rows_per_block;
  const int64_t end = begin + a.rows_per_block < a.examples ? begin + a.rows_per_block : a.examples;
  for (int64_t chunk = begin; chunk < end; chunk += narrow_chunk) {
    const int64_t next = chunk + narrow_chunk < end ? chunk + narrow_chunk : end;
    tile.stage_resident();
    for (int64_t first = chunk; first < next; first += Tile::block_rows) {
      tile.run(first + tile.warp * Tile::tile_rows, next,
               [&](int64_t row, int c, float value) { residuals[(row - chunk) * stride + c] = value; });
    }
    __syncthreads();
    const OuterProducts<T, padded, lanes> products{
        a, residuals, scratch, chunk, static_cast<int>(next - chunk), chunk == begin, tile.warp, tile.lane};
    products.run();
    __syncthreads();
  }
}

template <class T, int padded, int lanes, RowResult result>
__global__ void __launch_bounds__(32 * narrow_warps, 3) narrow_gradient(FASTMETA_STRUCTURE(NarrowArguments<T>) a) {
  FASTMETA_DYNAMIC_SHARED(float, scratch);
  sum_rows(RowTile<T, padded, lanes, result>(a, scratch), scratch);
  if (gridDim.x > 1) return;  // combine_partials goes on
  for (int64_t entry = threadIdx.x; entry < a.outputs * (a.num_features + 1); entry += blockDim.x) {
    write_entry(a, entry, a.partials[entry]);
  }
}

constexpr int combined_entries = 32, combined_groups = 8;

// Adds up the partial sums of all blocks, in the same order for every entry: eight running sums, then these.
template <class T>
__global__ void combine_partials(FASTMETA_STRUCTURE(NarrowArguments<T>) a, int64_t blocks) {
  FASTMETA_SHARED(float, shared, combined_entries* combined_groups);
  const int64_t in_weight = a.outputs * a.num_features;
  const int64_t entry = blockIdx.x * int64_t{combined_entries} + threadIdx.x;
  const int group = static_cast<int>(threadIdx.y);
  const bool inside = entry < in_weight + a.outputs;
  const float* from = entry < in_weight ? a.partials + entry : partial_bias(a, blocks, 0) + (entry - in_weight);
  const int64_t step = entry < in_weight ? in_weight : a.outputs;
  float sum = 0;
  if (inside) {
#pragma unroll 4
    for (int64_t block = group; block < blocks; block += combined_groups) sum += from[block * step];
  }
  shared[group * combined_entries + threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || !inside) return;
  for (int g = 1; g < combined_groups; ++g) sum += shared[g * combined_entries + threadIdx.x];
  write_entry(a, entry, sum);
}

// The whole call; out is the weight [C, D] and the bias [C] or [0]. False: it is not for this kernel (native.h).
template <RowResult result>
bool run_narrow_gradient(const char* name, const LastLayerCall& call, DLTensor* const* out, void* stream) {
  if (!is_narrow(call)) return false;
  if (call.sizes.outputs == 0) return true;
  const View features = call.operands.features, weight = out[0], bias = out[1];
  const Launcher launch(name, features.device_index(), stream);
  with_narrow_type(features, [&](auto zero) {
    using T = decltype(zero);
    NarrowArguments<T> a = narrow_arguments<T>(call);
    a.has_bias = bias.size(0) > 0;
    a.out = static_cast<T*>(weight.data());
    a.out_bias = static_cast<T*>(bias.data());
    const int factors = (result == RowResult::hessian ? 1 : 0) + (a.has_head ? 1 : 0);
    const NarrowPlan plan = plan_gradient(a.examples, a.num_features, a.outputs, factors, launch.multiprocessors());
    set_plan(a, plan);
    const int64_t entries = a.outputs * (a.num_features + 1);
    const Tensor partials = launch.scratch(plan.blocks * entries);
    a.partials = static_cast<float*>(partials.mutable_data_ptr());
    with_layout(plan.layout, [&](auto padded, auto lanes) {
      launch(narrow_gradient<T, padded(), lanes(), result>,
             {.blocks = dim3(static_cast<unsigned>(plan.blocks)),
              .threads = dim3(32 * narrow_warps),
              .shared_bytes = static_cast<size_t>(plan.shared_bytes())},
             a);
    });
    if (plan.blocks == 1) return;
    launch(combine_partials<T>,
           {.blocks = dim3(static_cast<unsigned>(ceil_div(entries, combined_entries))),
            .threads = dim3(combined_entries, combined_groups)},
           a, plan.blocks);
  });
  return true;
}

}  // namespace fastmeta
