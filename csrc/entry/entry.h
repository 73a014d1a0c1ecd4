// The fast entry of an operator: one call from Python to the kernel.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace fastmeta {

PyObject* entry_type();  // a new reference; null with a Python error

bool has_exchange_api();

// Adds the native operators that the function at `address` lists (fastmeta_cuda_operators of a loaded library).
void add_native_operators(const void* address);

}  // namespace fastmeta
