// Reads torch's tensors from their Python objects: what may be read without torch's dispatcher, and its memory.
//
// Torch hands out the functions behind torch.Tensor.__dlpack_c_exchange_api__ (DLPack 1.2): a DLTensor is filled in
// some 20 ns a tensor, where an argument of a registered operator costs ten times that. A DLTensor shows memory and
// layout and nothing else. What it does not show (a recorded derivative, dispatch modes, the negative bit) is checked
// here; where any of it is present the caller must go through torch. The GIL is held throughout.
//
//   if (!connected() || watched()) return go_through_torch();
//   const bool grad = aoti_torch_grad_mode_is_enabled();
//   DLTensor view;
//   if (!read_tensor(object, grad, &view)) return go_through_torch();
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// DLPack's structs do not change within a major version; torch merely keeps its header out of stable-ABI builds.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <cstdint>

namespace fastmeta {

// DLPackExchangeAPI of DLPack 1.2, written out because the header of an older torch does not have it.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; on failure -1 and a Python error
  int (*current_stream)(int device_type, int32_t device, void** stream);
};

// Torch's Python objects that the checks ask, found once and never released.
struct Torch {
  const ExchangeApi* api = nullptr;  // null: this torch does not have it, and no other member is valid
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyGetSetDef* requires_grad = nullptr;  // torch.Tensor.requires_grad and is_neg without a look-up by name
  PyMethodDef* is_neg = nullptr;
  PyObject *modes = nullptr, *functorch = nullptr, *tracing = nullptr;  // functions without arguments
  PyObject *forward_ad = nullptr, *current_level = nullptr;             // a module's dictionary and the name in it
};

namespace detail {

inline const ExchangeApi* exchange_api(PyObject* tensor_type) {
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  auto* api = capsule ? static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
  Py_XDECREF(capsule);  // the struct lives as long as the process
  while (api && api->major != 1) api = api->previous;
  return api && api->tensor_from_object ? api : nullptr;
}

inline Torch connect() {
  Torch found;
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* core = PyImport_ImportModule("torch._C");
  PyObject* forward_ad = PyImport_ImportModule("torch.autograd.forward_ad");
  PyObject* nn = PyImport_ImportModule("torch.nn");
  if (torch && core && forward_ad && nn) {
    PyObject* tensor = PyObject_GetAttrString(torch, "Tensor");
    PyObject* parameter = PyObject_GetAttrString(nn, "Parameter");
    PyObject* grad = tensor ? PyObject_GetAttrString(tensor, "requires_grad") : nullptr;
    PyObject* neg = tensor ? PyObject_GetAttrString(tensor, "is_neg") : nullptr;
    found.modes = PyObject_GetAttrString(core, "_len_torch_dispatch_stack");
    found.functorch = PyObject_GetAttrString(core, "_are_functorch_transforms_active");
    found.tracing = PyObject_GetAttrString(core, "_is_tracing");
    found.forward_ad = PyModule_GetDict(forward_ad);
    found.current_level = PyUnicode_InternFromString("_current_level");
    const bool complete = parameter && grad && neg && Py_TYPE(grad) == &PyGetSetDescr_Type &&
                          Py_TYPE(neg) == &PyMethodDescr_Type && found.modes && found.functorch && found.tracing;
    if (complete) {
      found.tensor = reinterpret_cast<PyTypeObject*>(tensor);
      found.parameter = reinterpret_cast<PyTypeObject*>(parameter);
      found.requires_grad = reinterpret_cast<PyGetSetDescrObject*>(grad)->d_getset;
      found.is_neg = reinterpret_cast<PyMethodDescrObject*>(neg)->d_method;
      if ((found.is_neg->ml_flags & METH_NOARGS) != 0) found.api = exchange_api(tensor);
    }
  }
  PyErr_Clear();  // whatever is missing: everything then goes through torch
  return found;
}

// Whether a function of torch's returned anything but False or 0; an error counts as true, so that the call goes
// through torch.
inline bool answers(PyObject* result) {
  const int truth = result ? PyObject_IsTrue(result) : -1;
  Py_XDECREF(result);
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

}  // namespace detail

inline const Torch& torch_objects() {
  static const Torch found = detail::connect();
  return found;
}

// Whether this torch lets tensors be read at all.
inline bool connected() { return torch_objects().api != nullptr; }

// Whether something in this thread must see the calls of operators: a dispatch mode, torch.func, torch.jit.trace, or a
// level of forward-mode differentiation, under which any tensor may have a tangent. torch.compile is not seen here: a
// caller in Python asks torch.compiler.is_compiling() first.
inline bool watched() {
  const Torch& torch = torch_objects();
  for (PyObject* function : {torch.modes, torch.functorch, torch.tracing}) {
    if (detail::answers(PyObject_CallNoArgs(function))) return true;
  }
  PyObject* level = PyDict_GetItemWithError(torch.forward_ad, torch.current_level);  // -1: none
  return level == nullptr || !PyLong_Check(level) || PyLong_AsLong(level) >= 0;
}

// Fills `out` from a plain tensor in memory. It borrows: the object must outlive it and keep its shape. False, with no
// Python error, for anything else: another type than torch.Tensor and torch.nn.Parameter, a tensor that requires grad
// while `grad` (grad mode is on), the negative bit, no memory behind it (sparse, meta, functional, zero tensor).
inline bool read_tensor(PyObject* object, bool grad, DLTensor* out) {
  const Torch& torch = torch_objects();
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
  if (grad && detail::answers(torch.requires_grad->get(object, torch.requires_grad->closure))) return false;
  if (detail::answers(torch.is_neg->ml_meth(object, nullptr))) return false;
  if (torch.api->tensor_from_object(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (out->data == nullptr) {
    for (int32_t i = 0; i < out->ndim; ++i) {
      if (out->shape[i] == 0) return true;
    }
    return false;
  }
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  out->byte_offset = 0;
  return true;
}

}  // namespace fastmeta
