// CUDA's language on the CPU, so that the kernels of this folder run, and are tested, where there is no GPU. Included
// by launch.h when FASTMETA_EMULATE is defined; emulator.cpp runs the threads of a block in turn, each from one barrier
// or warp operation to the next, in an order that FASTMETA_EMULATION_ORDER chooses.
//
// There are no floating-point atomics: with them a result would depend on the order.
#pragma once

#include <math.h>  // its overloads for float, too, in the global namespace

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace fastmeta::emulator {

// The least of what sm_80, sm_90 and sm_100 offer, and what a launch gets that does not ask for more.
constexpr size_t shared_limit = 163 * 1024, shared_unasked = 48 * 1024;
constexpr int multiprocessors = 8;

enum class Warp : int { sync, shuffle, ballot };

struct Place {
  uint3 thread, block;
  dim3 threads, blocks;
};
extern constinit thread_local Place place;

struct Launch {
  dim3 blocks, threads;
  size_t shared_bytes = 0;              // dynamic
  size_t shared_most = shared_unasked;  // with what the kernel declares
  bool cooperative = false;             // its blocks may wait for each other
};

// Runs `body` once for each thread of each block.
void run(const Launch& launch, const std::function<void()>& body);
// Waits for the block; how many of its threads came with `flag`.
int barrier(bool flag);
// Waits for all blocks.
void grid_barrier();
// Waits for the lanes of `mask`: the value of lane `source` (shuffle), or of which lanes the value is not 0 (ballot).
uint64_t warp(Warp operation, unsigned mask, uint64_t value, int source);
// Memory of the block, all bits 1 (NaN) when the block starts. One key: one array.
void* shared(const void* key, size_t bytes);
void* dynamic_shared();

inline int lane() {
  const Place& p = place;
  return static_cast<int>((p.thread.x + p.threads.x * (p.thread.y + p.threads.y * p.thread.z)) % 32);
}

template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const int first = lane() / width * width;
  const bool inside = source >= first && source < first + width;
  return std::bit_cast<T>(
      static_cast<Bits>(warp(Warp::shuffle, mask, std::bit_cast<Bits>(value), inside ? source : lane())));
}

}  // namespace fastmeta::emulator

#define threadIdx (::fastmeta::emulator::place.thread)
#define blockIdx (::fastmeta::emulator::place.block)
#define blockDim (::fastmeta::emulator::place.threads)
#define gridDim (::fastmeta::emulator::place.blocks)

#define FASTMETA_SHARED(type, name, count) \
  static constexpr char name##_key = 0;    \
  auto* const name = static_cast<type*>(::fastmeta::emulator::shared(&name##_key, sizeof(type) * (count)))
#define FASTMETA_DYNAMIC_SHARED(type, name) \
  auto* const name = static_cast<type*>(::fastmeta::emulator::dynamic_shared())

namespace fastmeta {
inline void grid_barrier() { emulator::grid_barrier(); }
}  // namespace fastmeta

inline void __syncthreads() { ::fastmeta::emulator::barrier(false); }
inline int __syncthreads_count(int flag) { return ::fastmeta::emulator::barrier(flag != 0); }
inline void __threadfence() {}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  using namespace fastmeta::emulator;
  warp(Warp::sync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int flag) {
  using namespace fastmeta::emulator;
  return static_cast<unsigned>(warp(Warp::ballot, mask, flag != 0, 0));
}
inline int __any_sync(unsigned mask, int flag) { return __ballot_sync(mask, flag) != 0; }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::fastmeta::emulator::lane();
  return ::fastmeta::emulator::shuffle(mask, value, lane / width * width + (source & (width - 1)), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return ::fastmeta::emulator::shuffle(mask, value, ::fastmeta::emulator::lane() ^ bits, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::fastmeta::emulator::shuffle(mask, value, ::fastmeta::emulator::lane() + static_cast<int>(delta), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::fastmeta::emulator::shuffle(mask, value, ::fastmeta::emulator::lane() - static_cast<int>(delta), width);
}

// The threads of a launch take turns, so these need no more than their effect.
template <std::integral T>
T atomicAdd(T* place, std::type_identity_t<T> value) {
  const T before = *place;
  *place = static_cast<T>(before + value);
  return before;
}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
using std::max;
using std::min;
