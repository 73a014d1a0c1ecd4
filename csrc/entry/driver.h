// The CUDA driver's launch, found in the library that is already there: building needs no CUDA.
#pragma once

#include <stdexcept>
#include <string>

namespace fastmeta {

// cuLaunchKernel, cuGetErrorString, cuCtxGetCurrent, cuCtxSetCurrent, cuDeviceGet and cuDevicePrimaryCtxRetain, as in
// the CUDA Driver API's documentation.
struct Driver {
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) = nullptr;
  int (*error_text)(int error, const char** text) = nullptr;
  int (*current_context)(void** context) = nullptr;
  int (*set_context)(void* context) = nullptr;
  int (*device)(int* device, int ordinal) = nullptr;
  int (*primary_context)(void** context, int device) = nullptr;
};

const Driver& driver();

// Takes the functions of this library, which then stays loaded; throws std::runtime_error.
void use_driver(const char* library);

// A loaded library's function, or std::runtime_error.
void* function_of(void* library, const char* name);

inline void check_launch(int error) {
  if (error == 0) return;
  const char* text = nullptr;
  driver().error_text(error, &text);
  throw std::runtime_error(std::string("CUDA refuses a launch: ") + (text ? text : "unknown error"));
}

// Makes the device's primary context current in a thread that has none, before its first work on a GPU.
inline void bind_context(int ordinal) {
  void* context = nullptr;
  if (driver().current_context(&context) == 0 && context) return;
  int device = 0;
  check_launch(driver().device(&device, ordinal));
  check_launch(driver().primary_context(&context, device));
  check_launch(driver().set_context(context));
}

}  // namespace fastmeta
