#include "driver.h"

#include <dlfcn.h>

namespace fastmeta {

namespace {

Driver in_use;

template <class Function>
void take(void* library, const char* name, Function* out) {
  *out = reinterpret_cast<Function>(function_of(library, name));
}

}  // namespace

void* function_of(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (!found) throw std::runtime_error(std::string("a library has no function ") + name);
  return found;
}

const Driver& driver() { return in_use; }

void use_driver(const char* name) {
  void* library = dlopen(name, RTLD_NOW);
  if (!library) throw std::runtime_error(dlerror());
  Driver found;
  take(library, "cuLaunchKernel", &found.launch);
  take(library, "cuGetErrorString", &found.error_text);
  take(library, "cuCtxGetCurrent", &found.current_context);
  take(library, "cuCtxSetCurrent", &found.set_context);
  take(library, "cuDeviceGet", &found.device);
  take(library, "cuDevicePrimaryCtxRetain", &found.primary_context);
  in_use = found;
}

}  // namespace fastmeta
