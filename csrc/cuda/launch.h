// Every kernel launch of this folder, checked: on a device and on a stream there. With
// FASTMETA_EMULATE the kernel runs on the CPU instead (emulator.h), and a launch returns when it is done.
//
// Kernels declare shared memory by FASTMETA_SHARED(type, name, count) and FASTMETA_DYNAMIC_SHARED(type, name), which
// make `name` a pointer, and a structure among their parameters by FASTMETA_STRUCTURE(type): read where the launch put
// it, not copied.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef FASTMETA_EMULATE
#include "cuda/emulator.h"
#define FASTMETA_STRUCTURE(...) const __VA_ARGS__&
#else
#include <cuda_runtime.h>
#define FASTMETA_STRUCTURE(...) const __grid_constant__ __VA_ARGS__
#define FASTMETA_SHARED(type, name, count) __shared__ type name[count]
#define FASTMETA_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) char fastmeta_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fastmeta_dynamic_shared)
#endif

// Where the operators of this folder are registered.
#ifndef FASTMETA_NAMESPACE
#define FASTMETA_NAMESPACE fastmeta
#endif
#ifndef FASTMETA_DEVICE_KEY
#define FASTMETA_DEVICE_KEY CUDA
#endif

namespace fastmeta {

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes = 0;   // dynamic
  bool cooperative = false;  // all blocks are resident at once, and may wait for each other
};

// 48 kB are there without asking, for both together: what the launch gives and up to 1 kB that a kernel declares.
constexpr bool asks_for_shared(const Grid& grid) { return grid.shared_bytes > 47 * 1024; }

constexpr size_t max_parameter_bytes = 32764;  // of a kernel, from sm_70 and CUDA 12.1 on

// torch's current stream on a device of its.
inline void* current_stream(int device);

// A device, current while this lives, and a stream there.
class Launcher {
 public:
  // `name` of the operator, for errors.
  Launcher(const char* name, int device, void* stream);
  Launcher(const char* name, int device) : Launcher(name, device, current_stream(device)) {}
  Launcher(const char* name, const torch::stable::Tensor& tensor) : Launcher(name, tensor.get_device_index()) {}

  // No blocks: nothing to do.
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), const Grid& grid,
                  const std::type_identity_t<Parameters>&... arguments) const {
    static_assert((sizeof(Parameters) + ... + 0) <= max_parameter_bytes);
    if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
#ifdef FASTMETA_EMULATE
    emulator::run({grid.blocks, grid.threads, grid.shared_bytes, shared_most(grid), grid.cooperative},
                  [&] { kernel(arguments...); });
#else
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
    launch(reinterpret_cast<const void*>(kernel), grid, pointers);
#endif
  }

  int multiprocessors() const;
  // Blocks like these that a multiprocessor holds at once; asked of the device.
  template <class... Parameters>
  int resident_blocks(void (*kernel)(Parameters...), const Grid& grid) const {
#ifdef FASTMETA_EMULATE
    return static_cast<int>(emulator::shared_limit / (grid.shared_bytes + 1024));
#else
    return resident_blocks(reinterpret_cast<const void*>(kernel), grid);
#endif
  }
  // Memory from torch's allocator.
  torch::stable::Tensor scratch(int64_t floats) const;
  // Sets bytes to 0, in the order of the stream.
  void clear(void* data, int64_t bytes) const;

#ifdef FASTMETA_EMULATE
 private:
  static size_t shared_most(const Grid& grid) {
    return asks_for_shared(grid) ? emulator::shared_limit : emulator::shared_unasked;
  }
#else
 private:
  void launch(const void* kernel, const Grid& grid, void** arguments) const;
  int resident_blocks(const void* kernel, const Grid& grid) const;
  void ask_for_shared(const void* kernel, const Grid& grid) const;
  void check(cudaError_t error) const;

  const char* name_;
  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t stream_;
#endif
};

#ifdef FASTMETA_EMULATE

inline void* current_stream(int) { return nullptr; }
inline Launcher::Launcher(const char*, int, void*) {}
inline int Launcher::multiprocessors() const { return emulator::multiprocessors; }
inline void Launcher::clear(void* data, int64_t bytes) const { std::memset(data, 0, bytes); }

#else

inline void Launcher::check(cudaError_t error) const {
  STD_TORCH_CHECK(error == cudaSuccess, name_, ": CUDA says ", cudaGetErrorString(error));
}

inline void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

inline Launcher::Launcher(const char* name, int device, void* stream)
    : name_(name), guard_(device), device_(device), stream_(static_cast<cudaStream_t>(stream)) {
  // The CUDA runtime in this library is its own, and so is its notion of the current device.
  check(cudaSetDevice(device_));
}

inline void Launcher::ask_for_shared(const void* kernel, const Grid& grid) const {
  if (!asks_for_shared(grid)) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)));
}

inline void Launcher::launch(const void* kernel, const Grid& grid, void** arguments) const {
  ask_for_shared(kernel, grid);
  check(grid.cooperative
            ? cudaLaunchCooperativeKernel(kernel, grid.blocks, grid.threads, arguments, grid.shared_bytes, stream_)
            : cudaLaunchKernel(kernel, grid.blocks, grid.threads, arguments, grid.shared_bytes, stream_));
}

inline int Launcher::resident_blocks(const void* kernel, const Grid& grid) const {
  ask_for_shared(kernel, grid);
  int count = 0;
  const int threads = static_cast<int>(grid.threads.x * grid.threads.y * grid.threads.z);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, grid.shared_bytes));
  return count;
}

inline int Launcher::multiprocessors() const {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
  return count;
}

inline void Launcher::clear(void* data, int64_t bytes) const { check(cudaMemsetAsync(data, 0, bytes, stream_)); }

#endif

inline torch::stable::Tensor Launcher::scratch(int64_t floats) const {
#ifdef FASTMETA_EMULATE
  const torch::stable::Device device(torch::headeronly::DeviceType::CPU);
#else
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                     static_cast<torch::stable::DeviceIndex>(device_));
#endif
  return torch::stable::empty({&floats, 1}, torch::headeronly::ScalarType::Float, std::nullopt, device);
}

}  // namespace fastmeta
