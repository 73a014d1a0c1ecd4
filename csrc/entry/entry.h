// The fast entry of an operator: one call from Python to the kernel.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace fastmeta {

PyObject* entry_type();  // a new reference; null with a Python error

bool has_exchange_api();  // whether this torch lets C read its tensors

}  // namespace fastmeta
