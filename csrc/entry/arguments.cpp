#include "arguments.h"

#include <bit>
#include <limits>

#include "exchange.h"

namespace fastmeta {

namespace {

bool read_number(PyObject* object, const NumberRule& rule, double* out) {
  if (rule.kind == NumberRule::Kind::flag) {
    *out = object == Py_True;
    return PyBool_Check(object);
  }
  if (rule.kind == NumberRule::Kind::optional && object == Py_None) {
    *out = std::numeric_limits<double>::quiet_NaN();
    return true;
  }
  if (PyFloat_Check(object) && rule.kind != NumberRule::Kind::code) {
    *out = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_CheckExact(object)) {
    *out = PyLong_AsDouble(object);
    if (*out == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
  } else {
    return false;
  }
  return *out >= rule.low && *out <= rule.high;
}

// What a schema takes for a number: NumPy's as well, and of any value.
bool read_any_number(PyObject* object, double* out) {
  *out = object == Py_None ? std::numeric_limits<double>::quiet_NaN() : PyFloat_AsDouble(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

}  // namespace

bool read(const Signature& signature, PyObject* const* objects, bool any_state, Arguments* out) {
  if (!connected() || (!any_state && watched())) return false;
  const bool grad = !any_state && aoti_torch_grad_mode_is_enabled();
  const DLTensor* first = nullptr;
  for (int i = 0; i < signature.num_tensors; ++i) {
    out->tensors[i] = nullptr;
    if (objects[i] == Py_None) continue;
    DLTensor* view = &out->views[i];
    if (!read_tensor(objects[i], grad, view) || view->ndim > most_dimensions) return false;
    if (first &&
        (view->device.device_type != first->device.device_type || view->device.device_id != first->device.device_id)) {
      return false;
    }
    if (!first) first = view;
    out->tensors[i] = view;
  }
  if (!first || !out->tensors[0]) return false;
  out->device = first->device;
  for (int i = 0; i < signature.num_numbers; ++i) {
    PyObject* number = objects[signature.num_tensors + i];
    const bool given = any_state ? read_any_number(number, &out->numbers[i])
                                 : read_number(number, signature.numbers[i], &out->numbers[i]);
    if (!given) return false;
  }
  return true;
}

namespace {

// Whether float32 products may use TF32: torch's own setting for CUDA.
uint64_t tf32_products() {
  static PyObject* getter = nullptr;
  static PyObject *backend = nullptr, *operation = nullptr, *tf32 = nullptr;
  if (!getter) {
    PyObject* core = PyImport_ImportModule("torch._C");
    getter = core ? PyObject_GetAttrString(core, "_get_fp32_precision_getter") : nullptr;
    Py_XDECREF(core);
    backend = PyUnicode_InternFromString("cuda");
    operation = PyUnicode_InternFromString("matmul");
    tf32 = PyUnicode_InternFromString("tf32");
  }
  PyObject* arguments[] = {backend, operation};
  PyObject* answer = getter ? PyObject_Vectorcall(getter, arguments, 2, nullptr) : nullptr;
  const int same = answer ? PyObject_RichCompareBool(answer, tf32, Py_EQ) : 0;
  Py_XDECREF(answer);
  PyErr_Clear();
  return same == 1;
}

}  // namespace

KeyView key_of(const Signature& signature, const Arguments& arguments, KeyWords* words) {
  size_t count = 0;
  const auto push = [&](uint64_t word) { (*words)[count++] = word; };
  const DLTensor& first = *arguments.tensors[0];
  const bool products = first.dtype.code == kDLFloat && first.dtype.bits == 32;
  push(static_cast<uint64_t>(arguments.device.device_id) << 8 | (products ? tf32_products() : 0));
  for (int i = 0; i < signature.num_tensors; ++i) {
    const DLTensor* tensor = arguments.tensors[i];
    if (!tensor) {
      push(0);
      continue;
    }
    const auto misaligned = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(tensor->data) & 15);
    push(1 + static_cast<uint64_t>(tensor->ndim) + (misaligned << 8) +
         (static_cast<uint64_t>(tensor->dtype.code) << 16) + (static_cast<uint64_t>(tensor->dtype.bits) << 24) +
         (static_cast<uint64_t>(tensor->dtype.lanes) << 32));
    for (int32_t j = 0; j < tensor->ndim; ++j) push(static_cast<uint64_t>(tensor->shape[j]));
    for (int32_t j = 0; j < tensor->ndim; ++j) push(static_cast<uint64_t>(tensor->strides[j]));
  }
  for (int i = 0; i < signature.num_numbers; ++i) {
    const double number = arguments.numbers[i];
    switch (signature.numbers[i].kind) {
      case NumberRule::Kind::code:
      case NumberRule::Kind::flag:
        push(std::bit_cast<uint64_t>(number));
        break;
      case NumberRule::Kind::or_zero:
        push(number != 0.0);
        break;
      default:
        break;
    }
  }
  return {words->data(), count};
}

}  // namespace fastmeta
