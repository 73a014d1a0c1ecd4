"""Native functions that say they were called: 42 in every result, and the first number of the call beside it."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

_SOURCE = r"""
#include <ATen/dlpack.h>
#include <math.h>
static void fill(const DLTensor *tensor, float value) {
  long long count = 1;
  for (int i = 0; i < tensor->ndim; ++i) count *= tensor->shape[i];
  for (long long i = 0; i < count; ++i) ((float *)tensor->data)[i] = value;
}
static unsigned char run(const DLTensor *const *tensors, const double *numbers, DLTensor *const *out, void *stream) {
  if (numbers[0] == 3.0) return 0; /* not mine */
  fill(out[0], 42.0f);
  return 1;
}
static unsigned char run_two(const DLTensor *const *tensors, const double *numbers, DLTensor *const *out, void *s) {
  fill(out[0], 42.0f);
  fill(out[1], (float)numbers[0]);
  return 1;
}
static unsigned char run_in_place(const DLTensor *const *tensors, const double *numbers, DLTensor *const *out,
                                  void *stream) {
  fill(tensors[0], isnan(numbers[4]) ? 42.0f : (float)numbers[4]);
  return 1;
}
struct Operator {
  const char *name, *device;
  int tensors, numbers, outputs;
  unsigned char (*run)(const DLTensor *const *, const double *, DLTensor *const *, void *);
};
static const struct Operator operators[] = {
    {"per_example_dot", "cpu", 7, 1, 1, run},
    {"label_gradient", "cpu", 7, 2, 1, run},
    {"last_layer_gradient", "cpu", 6, 1, 2, run_two},
    {"hessian_vector_product", "cpu", 6, 2, 2, run_two},
    {"feature_similarity", "cpu", 3, 2, 1, run},
    {"finite_difference_labels", "cpu", 4, 2, 1, run},
    {"masked_adam_", "cpu", 6, 6, 0, run_in_place},
};
const struct Operator *operators_of_tests(int *count) {
  *count = sizeof operators / sizeof *operators;
  return operators;
}
"""


@cache
def address() -> int:
    """Of the function that lists them."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="fastmeta-native-"))
    (folder / "native.c").write_text(_SOURCE)
    include = Path(torch.__file__).parent / "include"
    library = folder / "native.so"
    command = [compiler, "-shared", "-fPIC", f"-I{include}", str(folder / "native.c"), "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).operators_of_tests
    return ctypes.cast(function, ctypes.c_void_p).value or 0
