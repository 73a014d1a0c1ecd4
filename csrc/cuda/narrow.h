// What the kernels for C <= 32 outputs share. A row of outputs fits the registers of part of a warp, so products, row
// function and result are one pass over the features, without tiles of a GEMM.
#pragma once

#ifdef FASTMETA_EMULATE
#include <stdexcept>
#endif

#include "cuda/narrow_arguments.h"
#include "losses.h"

namespace fastmeta {

struct Quad {
  float v[4];
};

// Vectors in memory, in one instruction. A GPU stops at an address that is not a multiple of the vector's size, a CPU
// does not.
template <class V>
__device__ __forceinline__ V* vector_at(void* address) {
#ifdef FASTMETA_EMULATE
  if (reinterpret_cast<uintptr_t>(address) % sizeof(V) != 0) throw std::logic_error("a vector at an unaligned address");
#endif
  return static_cast<V*>(address);
}

template <class V>
__device__ __forceinline__ V load_vector(const void* from) {
  return *vector_at<V>(const_cast<void*>(from));
}

__device__ __forceinline__ Quad read_quad(const float* from) {
  const auto quad = load_vector<float4>(from);
  return {quad.x, quad.y, quad.z, quad.w};
}

__device__ __forceinline__ void write_quad(float* to, const Quad& quad) {
  const float4 packed{quad.v[0], quad.v[1], quad.v[2], quad.v[3]};
  *vector_at<float4>(to) = packed;
}

// The four features that lane k of `lanes` has of a slab: side by side, or `lanes` apart so that a warp's loads of
// single numbers meet.
template <int lanes, class T>
__device__ __forceinline__ Quad load_quad(const T* row, int64_t column, int64_t slab_begin, int k, int64_t features,
                                          bool vectorized) {
  Quad quad{};
  if (vectorized) {
    const int64_t d = slab_begin + 4 * k;
    if (d < features) {
      const auto packed = load_vector<Packed<T>>(row + d);
      for (int i = 0; i < 4; ++i) quad.v[i] = widen(packed.v[i]);
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      const int64_t d = slab_begin + k + lanes * i;
      if (d < features) quad.v[i] = widen(row[d * column]);
    }
  }
  return quad;
}

// Sums over the lanes that differ in the bits from `mask` down to `last`: of `count` sums each lane keeps those whose
// place starts with its own bits.
template <int mask, int last, int count, int size>
__device__ __forceinline__ void scatter_sum(float (&sums)[size], int lane) {
  if constexpr (mask >= last) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float kept = upper ? sums[i + count / 2] : sums[i];
      const float sent = upper ? sums[i] : sums[i + count / 2];
      sums[i] = kept + __shfl_xor_sync(0xffffffffu, sent, mask);
    }
    scatter_sum<mask / 2, last, count / 2>(sums, lane);
  }
}

// `reduce` of losses.h over the lanes that hold a row.
template <int lanes>
struct LaneReduce {
  FASTMETA_ROW_FUNCTION float sum(float x) const {
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) x += exchange(x, mask);
    return x;
  }
  FASTMETA_ROW_FUNCTION float max(float x) const {
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) x = scalar::larger(x, exchange(x, mask));
    return x;
  }

 private:
  static FASTMETA_ROW_FUNCTION float exchange(float x, int mask) {
#if defined(__CUDA_ARCH__) || defined(FASTMETA_EMULATE)
    return __shfl_xor_sync(0xffffffffu, x, mask);
#else
    return x + static_cast<float>(mask);  // losses.h compiles for the host as well, where nothing calls it
#endif
  }
};

// The rows of one warp's tile: products, row function, result. With `own_direction` the tangent's weight is the
// block's.
template <class T, int padded, int lanes, RowResult result, bool own_direction = false>
struct RowTile {
  static constexpr NarrowLayout layout{padded, lanes};
  static constexpr int rows = layout.rows(), teams = layout.teams(), slab_features = layout.slab();
  static constexpr int num_sums = layout.sums(), spread = layout.spread(), count = layout.count();
  static constexpr int held = layout.held(), tile_rows = layout.tile_rows(), block_rows = layout.block_rows();
  static constexpr bool has_tangent = result != RowResult::gradient;
  static constexpr RowFunction function = result == RowResult::label_gradient ? RowFunction::label_tangent
                                          : result == RowResult::hessian      ? RowFunction::curvature
                                                                              : RowFunction::residual;
  using Held = float[held * count];

  const NarrowArguments<T>& a;
  float* factors;  // shared
  int warp, lane;
  const T* direction;

  __device__ RowTile(const NarrowArguments<T>& arguments, float* shared, const T* own = nullptr)
      : a(arguments),
        factors(shared),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(threadIdx.x % 32),
        direction(own) {}

  __device__ __forceinline__ decltype(auto) tangent() const {
    if constexpr (own_direction) {
      return Factor<T>{{direction, a.tangent.weight.row, a.tangent.weight.column}, {}};
    } else {
      return (a.tangent);
    }
  }

  __device__ int output(int m) const { return lane % spread * count + m; }

  // Columns [begin, begin + staged) of a factor into shared memory, in the order that load_quad gives them to lanes;
  // `number` factors lie before it.
  __device__ __forceinline__ void stage(const Strided<T>& weight, int64_t begin, int number) const {
    const int slabs = static_cast<int>(a.staged) / slab_features;
    const int team = lane / lanes, k = lane % lanes;
    for (int task = warp * teams + team; task < a.outputs * slabs; task += narrow_warps * teams) {
      const int c = task / slabs, slab = task % slabs;
      const Quad quad = load_quad<lanes>(weight.at(c), weight.column, begin + int64_t{slab} * slab_features, k,
                                         a.num_features, a.vectorized);
      write_quad(factors + ((number * a.outputs + c) * slabs + slab) * slab_features + 4 * k, quad);
    }
  }

  // All factors, if they stay; for all threads of the block.
  __device__ __forceinline__ void stage_resident() const {
    if (!a.resident || a.staged == 0) return;
#pragma unroll 1
    for (int i = has_tangent ? 0 : 1; i < (a.has_head ? 2 : 1); ++i) {
      stage(i == 0 ? tangent().weight : a.head.weight, 0, has_tangent ? i : 0);
    }
    __syncthreads();
  }

  // sums[place(r, c)] += <features[r], factor[c]> over columns [begin, begin + staged).
  __device__ __forceinline__ void accumulate(const T* const (&from)[rows], const float* factor, int64_t begin,
                                             float (&sums)[num_sums]) const {
    const int k = lane % lanes;
    const int64_t left = a.num_features - begin;
    const int slabs = static_cast<int>((left < a.staged ? left : a.staged) + slab_features - 1) / slab_features;
    for (int slab = 0; slab < slabs; ++slab) {
      Quad h[rows];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        h[r] = load_quad<lanes>(from[r], a.features.column, begin + int64_t{slab} * slab_features, k, a.num_features,
                                a.vectorized);
      }
#pragma unroll
      for (int c = 0; c < padded; ++c) {
        if (c >= a.outputs) break;
        const Quad v = read_quad(factor + c * a.staged + slab * slab_features + 4 * k);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[NarrowLayout{padded, lanes}.place(r, c)] += h[r].v[i] * v.v[i];
        }
      }
    }
  }

  // The outputs of a factor that this lane holds. For all threads of the block.
  __device__ __forceinline__ void project(const Factor<T>& factor, float* staged, int64_t first, int64_t end,
                                          Held& outputs) const {
    const T* from[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t row = first + lane / lanes * rows + r;
      from[r] = a.features.at(row < end ? row : end - 1);  // a row again, for nothing
    }
    float sums[num_sums];
#pragma unroll
    for (int i = 0; i < num_sums; ++i) sums[i] = 0;
    for (int64_t begin = 0; begin < a.num_features; begin += a.staged) {
      if (!a.resident) {
        __syncthreads();
        stage(factor.weight, begin, 0);
        __syncthreads();
      }
      accumulate(from, staged, begin, sums);
    }
    scatter_sum<lanes / 2, 1, num_sums>(sums, lane);
#pragma unroll
    for (int i = 0; i < held * count; ++i) {
      const int c = output(i % count);
      outputs[i] = sums[i] + (factor.bias.data != nullptr && c < a.outputs ? factor.bias(c, 0) : 0.0f);
    }
  }

  // The results of rows [first, first + tile_rows) below `end`: sink(row, output, value), or with `dot`
  // sink(row, 0, value) once. For all threads of the block.
  template <class Sink>
  __device__ __forceinline__ void run(int64_t first, int64_t end, const Sink& sink) const {
    Held f, y, z;
    float weight[held];
    const bool has_targets = a.targets.data != nullptr || a.classes.data != nullptr;
    // Reads that do not wait for the products.
#pragma unroll
    for (int q = 0; q < held; ++q) {
      const int64_t row = first + lane / spread * held + q;
      weight[q] = row < end && a.weights.data != nullptr ? a.weights(row, 0) : 1.0f;
#pragma unroll
      for (int m = 0; m < count; ++m) {
        const int c = output(m), i = q * count + m;
        const bool inside = row < end && c < a.outputs;
        f[i] = inside && !a.has_head ? a.logits(row, c) : a.padding;
        y[i] = z[i] = 0;
        if (has_targets && inside) {
          // A class out of range is no class.
          y[i] = a.targets.data != nullptr ? a.targets(row, c) : (*a.classes.at(row) == c ? 1.0f : 0.0f);
        }
      }
    }
    float* staged = factors;
#pragma unroll 1
    for (int i = has_tangent ? 0 : 1; i < (a.has_head ? 2 : 1); ++i) {
      Held outputs;
      project(i == 0 ? tangent() : a.head, staged, first, end, outputs);
      if (a.resident) staged += a.outputs * a.staged;
#pragma unroll
      for (int j = 0; j < held * count; ++j) {
        if (i == 0) {
          z[j] = outputs[j];
        } else if (output(j % count) < a.outputs) {
          f[j] = outputs[j];
        }
      }
    }
#pragma unroll
    for (int q = 0; q < held; ++q) {
      const int64_t row = first + lane / spread * held + q;
      float value[count];
      scalar::row_function(a.loss, function, count, f + q * count, y + q * count, z + q * count, value,
                           LaneReduce<spread>());
      if constexpr (result == RowResult::dot) {
        float sum = 0;
        for (int m = 0; m < count; ++m) sum += output(m) < a.outputs ? value[m] * z[q * count + m] : 0.0f;
        sum = LaneReduce<spread>().sum(sum);
        if (row < end && lane % spread == 0) sink(row, 0, sum);
      } else {
        for (int m = 0; m < count; ++m) {
          if (row < end) sink(row, output(m), result == RowResult::label_gradient ? value[m] : weight[q] * value[m]);
        }
      }
    }
  }
};

}  // namespace fastmeta
