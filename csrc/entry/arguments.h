// The arguments of a call of the fast entry, and the key that its plan is kept under.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>

#include "plans.h"
#include "signatures.h"

namespace fastmeta {

// The arguments of a call, taken apart. Tensors are borrowed from the caller.
struct Arguments {
  std::array<DLTensor, most_tensors> views;
  std::array<const DLTensor*, most_tensors> tensors;  // null: absent
  std::array<double, most_numbers> numbers;
  DLDevice device;
};

// False, without a Python error, where the call must go the slow way. `any_state`: the caller is below autograd and has
// handled dispatch modes and derivatives, so they are not looked at; the kernel checks the values of numbers.
bool read(const Signature& signature, PyObject* const* objects, bool any_state, Arguments* out);

using KeyWords = std::array<uint64_t, 2 + most_tensors * (1 + 2 * most_dimensions) + most_numbers>;

// Everything a plan may depend on: shapes, strides, dtypes, addresses modulo 16, the numbers that choose a plan, the
// device, and the precision of float32 products. The view is of `words`.
KeyView key_of(const Signature& signature, const Arguments& arguments, KeyWords* words);

}  // namespace fastmeta
