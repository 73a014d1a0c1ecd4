// Kernels of which some are wrong, for test_cuda_emulator.py: does the emulator show it?
#include "cuda/emulator.h"

#include <exception>
#include <string>

using fastmeta::grid_barrier;
using fastmeta::emulator::Launch;
using fastmeta::emulator::run;

namespace {

constexpr int threads = 96;

// Each thread's number, handed over in shared memory in the opposite order.
void reverse(float* out, bool with_barrier) {
  FASTMETA_SHARED(float, shared, threads);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = static_cast<float>(blockIdx.x * threads + threadIdx.x);
  if (with_barrier) __syncthreads();
  out[blockIdx.x * threads + threadIdx.x] = shared[threads - 1 - t];
}

// Two rounds through one array: the second write needs a barrier after the first read.
void two_rounds(float* out, bool with_barrier) {
  FASTMETA_SHARED(float, shared, threads);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = static_cast<float>(t + 1);
  __syncthreads();
  const float first = shared[(t + 1) % threads];
  if (with_barrier) __syncthreads();
  shared[t] = static_cast<float>(1000 * (t + 1));
  __syncthreads();
  out[t] = first + shared[(t + 1) % threads];
}

void warps(float* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  float sum = static_cast<float>(t);
  for (int bits = 4; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits, 8);
  out[t] = sum;
  out[threads + t] = __shfl_sync(0xffffffffu, static_cast<float>(t), 5, 16);
  out[2 * threads + t] = __shfl_down_sync(0xffffffffu, static_cast<float>(t), 3);
  out[3 * threads + t] = __shfl_up_sync(0xffffffffu, static_cast<float>(t), 3);
  out[4 * threads + t] = static_cast<float>(__ballot_sync(0xffffffffu, lane % 2 == 1) == 0xaaaaaaaau);
  // Half a warp on its own.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16) out[5 * threads + t] = static_cast<float>(__popc(__ballot_sync(half, lane < 5)));
  if (lane >= 16) out[5 * threads + t] = static_cast<float>(__any_sync(half, lane < 5));
  out[6 * threads + t] = static_cast<float>(__syncthreads_count(t % 3 == 0));
}

void uninitialized(float* out) {
  FASTMETA_DYNAMIC_SHARED(float, dynamic);
  FASTMETA_SHARED(float, fixed, 1);
  if (blockIdx.x == 0) dynamic[0] = fixed[0] = 1;
  out[2 * blockIdx.x] = dynamic[0];
  out[2 * blockIdx.x + 1] = fixed[0];
}

// The block that comes k-th to a ticket is numbered k.
void tickets(float* out, unsigned* counter) { out[blockIdx.x] = static_cast<float>(atomicAdd(counter, 1u)); }

void absent_lane(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 3);
}

void stuck() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// Three rounds through one array of the grid: what every block left there, to each.
void across_blocks(float* out, bool with_second_barrier) {
  float* board = out + gridDim.x;
  float sum = 0;
  for (int round = 1; round <= 3; ++round) {
    if (threadIdx.x == 0) board[blockIdx.x] = static_cast<float>(round * (blockIdx.x + 1));
    grid_barrier();
    for (unsigned b = 0; b < gridDim.x; ++b) sum += board[b];
    if (with_second_barrier) grid_barrier();
  }
  if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = sum;
}

// One array for two sums of a block, warp by warp: the second needs a barrier after the first is read.
void two_sums(float* out, bool with_barrier) {
  FASTMETA_SHARED(float, shared, threads / 32);
  float found = 0;
  for (int round = 1; round <= 2; ++round) {
    float sum = static_cast<float>(round);
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (with_barrier) __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int w = 0; w < threads / 32; ++w) found += shared[w];
  }
  out[threadIdx.x] = found;
}

void leaves_early() {
  if (blockIdx.x != 1) grid_barrier();
}

void thread_leaves_early() {
  if (threadIdx.x != 1) grid_barrier();
}

std::string said;

}  // namespace

extern "C" {

// The error's words, or an empty string.
const char* launch(const char* name, float* out, unsigned blocks, unsigned threads_of_block,
                   uint64_t shared_bytes) try {
  const std::string kernel = name;
  const Launch launched{.blocks = blocks, .threads = threads_of_block, .shared_bytes = shared_bytes};
  const auto start = [&](auto body) { run(launched, body); };
  const auto together = [&](auto body) {
    Launch cooperative = launched;
    cooperative.cooperative = true;
    run(cooperative, body);
  };
  said.clear();
  unsigned counter = 0;
  if (kernel == "reverse") start([&] { reverse(out, true); });
  if (kernel == "reverse without barrier") start([&] { reverse(out, false); });
  if (kernel == "two rounds") start([&] { two_rounds(out, true); });
  if (kernel == "two rounds without barrier") start([&] { two_rounds(out, false); });
  if (kernel == "two sums") start([&] { two_sums(out, true); });
  if (kernel == "two sums without barrier") start([&] { two_sums(out, false); });
  if (kernel == "warps") start([&] { warps(out); });
  if (kernel == "uninitialized") start([&] { uninitialized(out); });
  if (kernel == "tickets") start([&] { tickets(out, &counter); });
  if (kernel == "absent lane") start([&] { absent_lane(out); });
  if (kernel == "stuck") start([] { stuck(); });
  if (kernel == "outside its mask") start([] { __syncwarp(0x0000ffffu); });
  if (kernel == "nothing") start([] {});
  if (kernel == "across blocks") together([&] { across_blocks(out, true); });
  if (kernel == "across blocks with one barrier") together([&] { across_blocks(out, false); });
  if (kernel == "leaves early") together([] { leaves_early(); });
  if (kernel == "thread leaves early") together([] { thread_leaves_early(); });
  if (kernel == "nothing together") together([] {});
  if (kernel == "not cooperative") start([] { grid_barrier(); });
  return said.c_str();
} catch (const std::exception& error) {
  said = error.what();
  return said.c_str();
}
}
