#include "cublaslt.h"

#include <dlfcn.h>

#include <map>
#include <stdexcept>

#include "driver.h"

namespace fastmeta::lt {

namespace {

Library in_use;
bool taken = false;
std::map<int, Handle> handles;

template <class Function>
void take(void* loaded, const char* name, Function* out) {
  *out = reinterpret_cast<Function>(function_of(loaded, name));
}

}  // namespace

void use(const std::vector<std::string>& names) {
  void* loaded = nullptr;
  for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
    for (const std::string& name : names) {
      if (!loaded) loaded = dlopen(name.c_str(), flags);
    }
  }
  if (!loaded) throw std::runtime_error("cuBLASLt is not found");
  Library found;
  take(loaded, "cublasLtCreate", &found.create);
  take(loaded, "cublasLtMatmulDescCreate", &found.matmul_desc_create);
  take(loaded, "cublasLtMatmulDescDestroy", &found.matmul_desc_destroy);
  take(loaded, "cublasLtMatmulDescSetAttribute", &found.matmul_desc_set);
  take(loaded, "cublasLtMatrixLayoutCreate", &found.layout_create);
  take(loaded, "cublasLtMatrixLayoutDestroy", &found.layout_destroy);
  take(loaded, "cublasLtMatmulPreferenceCreate", &found.preference_create);
  take(loaded, "cublasLtMatmulPreferenceDestroy", &found.preference_destroy);
  take(loaded, "cublasLtMatmulPreferenceSetAttribute", &found.preference_set);
  take(loaded, "cublasLtMatmulAlgoGetHeuristic", &found.heuristic);
  take(loaded, "cublasLtMatmul", &found.matmul);
  in_use = found;
  handles.clear();
  taken = true;
}

const Library* library() { return taken ? &in_use : nullptr; }

Handle handle(int device) {
  Handle& found = handles[device];
  if (!found && in_use.create(&found) != 0) throw std::runtime_error("cuBLASLt cannot be initialized");
  return found;
}

}  // namespace fastmeta::lt
