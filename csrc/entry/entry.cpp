#include "entry.h"

#include <structmember.h>

#include <cstring>
#include <exception>
#include <new>
#include <utility>
#include <vector>

#include "../native.h"
#include "allocate.h"
#include "arguments.h"
#include "exchange.h"
#include "program.h"

namespace fastmeta {

namespace {

using List = const NativeOperator* (*)(int* count);

// Null if the list has none.
NativeFunction find_native(const Signature& signature, const char* device, List list) {
  int count = 0;
  const NativeOperator* first = list(&count);
  for (const NativeOperator* each = first; each != first + count; ++each) {
    if (std::strcmp(each->name, signature.name) == 0 && std::strcmp(each->device, device) == 0 &&
        each->num_tensors == signature.num_tensors && each->num_numbers == signature.num_numbers &&
        each->num_outputs == signature.num_outputs) {
      return each->run;
    }
  }
  return nullptr;
}

struct EntryObject {
  PyObject_HEAD;
  vectorcallfunc vectorcall;
  const Signature* signature;
  NativeFunction on_cpu, on_cuda;
  int programs_on;  // device type of the tensors that programs run on
  Plans* plans;
  // The allocator's arguments for the results of the last call on the CPU, and what they were made for.
  Shape shapes[most_outputs];
  PyObject *dtype, *allocations[most_outputs];
};

PyObject* slow_way() { return Py_NewRef(Py_NotImplemented); }

// New tensors, until they are taken.
struct Results {
  PyObject* tensors[most_outputs]{};

  Results() = default;
  Results(const Results&) = delete;
  ~Results() {
    for (PyObject* tensor : tensors) Py_XDECREF(tensor);
  }
  PyObject* take(int i) { return std::exchange(tensors[i], nullptr); }
};

// One tensor, or a tuple.
PyObject* wrap(const Signature& signature, Results& results) {
  if (signature.num_outputs == 0) return Py_NewRef(Py_None);
  if (signature.num_outputs == 1) return results.take(0);
  PyObject* pair = PyTuple_New(2);
  if (!pair) return nullptr;
  PyTuple_SET_ITEM(pair, 0, results.take(0));
  PyTuple_SET_ITEM(pair, 1, results.take(1));
  return pair;
}

// As the public function answers: a bias that was not asked for is None, where the schema has an empty tensor.
PyObject* wrap_public(const Signature& signature, const Arguments& arguments, Results& results) {
  if (signature.second_if_given >= 0 && !arguments.tensors[signature.second_if_given]) {
    Py_SETREF(results.tensors[1], Py_NewRef(Py_None));
  }
  return wrap(signature, results);
}

PyObject* dtype_object(const DLDataType& type) {
  const Allocator& torch = allocator();
  if (type.lanes != 1) return nullptr;
  if (type.code == kDLFloat && type.bits == 32) return torch.float32;
  if (type.code == kDLBfloat && type.bits == 16) return torch.bfloat16;
  if (type.code == kDLFloat && type.bits == 16) return torch.float16;
  if (type.code == kDLFloat && type.bits == 64) return torch.float64;
  return nullptr;
}

// Allocates the results of a native function. False with a Python error.
bool allocate(EntryObject* self, const Shape* shapes, PyObject* dtype, bool on_cuda, Results& results,
              DLTensor* views) {
  PyObject* function = on_cuda ? allocator().cuda : allocator().cpu;
  if (self->dtype != dtype) {  // before anything can fail: no allocation of another dtype may be taken for one of this
    for (PyObject*& allocation : self->allocations) Py_CLEAR(allocation);
    self->dtype = dtype;
  }
  for (int i = 0; i < self->signature->num_outputs; ++i) {
    const bool same = self->allocations[i] && std::memcmp(&self->shapes[i], &shapes[i], sizeof(Shape)) == 0;
    if (!same) {
      PyObject* arguments = allocation(shapes[i].size, shapes[i].dimensions, dtype);
      if (!arguments) return false;
      Py_XSETREF(self->allocations[i], arguments);
      self->shapes[i] = shapes[i];
    }
    PyObject* result = results.tensors[i] = PyObject_Call(function, self->allocations[i], nullptr);
    if (!result || torch_objects().api->tensor_from_object(result, &views[i]) != 0) return false;
  }
  return true;
}

// Work of less than some 20 us keeps the GIL: to get it back from a busy thread can take 5 ms.
class WithoutGil {
 public:
  explicit WithoutGil(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

bool is_large(const Signature& signature, const Arguments& arguments) {
  int64_t elements = 0;
  for (int i = 0; i < signature.num_tensors; ++i) {
    if (const DLTensor* tensor = arguments.tensors[i]) {
      int64_t product = 1;
      for (int32_t j = 0; j < tensor->ndim; ++j) product *= tensor->shape[j];
      elements += product;
    }
  }
  return elements >= 1 << 16;
}

// Tells autograd that an in-place operator wrote: a backward through the old values must raise. False with a Python
// error.
bool count_versions(const Signature& signature, PyObject* const* objects) {
  static PyObject* increment = nullptr;
  if (!increment) {
    PyObject* graph = PyImport_ImportModule("torch.autograd.graph");
    increment = graph ? PyObject_GetAttrString(graph, "increment_version") : nullptr;
    Py_XDECREF(graph);
  }
  PyObject* written = increment ? PyTuple_New(4) : nullptr;
  if (!written) return false;
  for (int i = 0; i < 4; ++i) PyTuple_SET_ITEM(written, i, Py_NewRef(objects[signature.written[i]]));
  PyObject* answer = PyObject_CallOneArg(increment, written);
  Py_DECREF(written);
  Py_XDECREF(answer);
  return answer != nullptr;
}

// The shapes of the results and their dtype; false if they cannot be told.
bool describe(const Signature& signature, const Arguments& arguments, Shape* shapes, PyObject** dtype) {
  *dtype = dtype_object(arguments.tensors[0]->dtype);
  return *dtype && signature.shapes(arguments.tensors.data(), shapes);
}

// False: with a Python error, or the function does not take these arguments. Throws what the function throws.
bool run_native(EntryObject* self, NativeFunction function, const Arguments& arguments, PyObject* const* objects,
                void* stream, Results& results) {
  const Signature& signature = *self->signature;
  Shape shapes[most_outputs]{};
  PyObject* dtype;
  if (!describe(signature, arguments, shapes, &dtype)) return false;
  DLTensor views[most_outputs];
  DLTensor* out[most_outputs] = {&views[0], &views[1]};
  if (!allocate(self, shapes, dtype, arguments.device.device_type == kDLCUDA, results, views)) return false;
  {
    const WithoutGil unlocked(is_large(signature, arguments));
    if (!function(arguments.tensors.data(), arguments.numbers.data(), out, stream)) return false;
  }
  return signature.written[1] < 0 || count_versions(signature, objects);
}

PyObject* run_or_slow_way(EntryObject* self, NativeFunction function, const Arguments& arguments,
                          PyObject* const* objects, void* stream) {
  Results results;
  try {
    if (run_native(self, function, arguments, objects, stream, results)) {
      return wrap_public(*self->signature, arguments, results);
    }
  } catch (const std::exception&) {  // the slow way words the error
  }
  return PyErr_Occurred() ? nullptr : slow_way();
}

// Whether the tensors are on the GPU that is current: memory is allocated there and kernels are launched there.
bool on_current_device(int32_t device) {
  static PyObject* current = nullptr;
  if (!current) {
    PyObject* core = PyImport_ImportModule("torch._C");
    current = core ? PyObject_GetAttrString(core, "_cuda_getDevice") : nullptr;
    Py_XDECREF(core);
  }
  PyObject* answer = current ? PyObject_CallNoArgs(current) : nullptr;
  const long number = answer ? PyLong_AsLong(answer) : -1;
  Py_XDECREF(answer);
  PyErr_Clear();
  return number == device;
}

PyObject* run_planned(EntryObject* self, PyObject* plan, const Arguments& arguments, PyObject* const* objects) {
  const bool on_cuda = arguments.device.device_type == kDLCUDA;
  void* stream = nullptr;
  if (on_cuda && torch_objects().api->current_stream(kDLCUDA, arguments.device.device_id, &stream) != 0) {
    PyErr_Clear();
    return slow_way();
  }
  if (Py_TYPE(plan) != program_type()) {  // "native", or a plan that Python runs
    const bool native = PyUnicode_Check(plan) && self->on_cuda;
    return native ? run_or_slow_way(self, self->on_cuda, arguments, objects, stream) : slow_way();
  }
  void* inputs[most_tensors];
  for (int i = 0; i < self->signature->num_tensors; ++i) {
    inputs[i] = arguments.tensors[i] ? arguments.tensors[i]->data : nullptr;
  }
  Results results;
  Py_INCREF(plan);  // another thread may forget the plans meanwhile
  const auto& program = *reinterpret_cast<ProgramObject*>(plan);
  const bool done = run_program(program, on_cuda ? arguments.device.device_id : -1, inputs, arguments.numbers.data(),
                                stream, results.tensors);
  Py_DECREF(plan);
  return done ? wrap_public(*self->signature, arguments, results) : nullptr;
}

int num_arguments(const EntryObject* self) { return self->signature->num_tensors + self->signature->num_numbers; }

PyObject* entry_call(PyObject* object, PyObject* const* objects, size_t flags, PyObject* names) {
  auto* self = reinterpret_cast<EntryObject*>(object);
  if (names || PyVectorcall_NARGS(flags) != num_arguments(self)) return slow_way();
  if (!self->on_cpu && self->plans->size() == 0) return slow_way();
  Arguments arguments;
  if (!read(*self->signature, objects, false, &arguments)) return slow_way();
  const int device = arguments.device.device_type;
  if (device == self->programs_on) {
    if (device == kDLCUDA && !on_current_device(arguments.device.device_id)) return slow_way();
    KeyWords words;
    PyObject* plan = self->plans->find(key_of(*self->signature, arguments, &words));
    return plan ? run_planned(self, plan, arguments, objects) : slow_way();
  }
  if (device != kDLCPU || !self->on_cpu) return slow_way();
  return run_or_slow_way(self, self->on_cpu, arguments, objects, nullptr);
}

// The CUDA library's function, for who has dealt with autograd and made the tensors' device the current one.
PyObject* entry_cuda(PyObject* object, PyObject* const* objects, Py_ssize_t count) {
  auto* self = reinterpret_cast<EntryObject*>(object);
  const Signature& signature = *self->signature;
  Arguments arguments;
  if (!self->on_cuda || count != num_arguments(self) || !read(signature, objects, true, &arguments)) {
    return PyErr_Format(PyExc_TypeError,
                        "the CUDA kernel of %s takes %d plain tensors, all on one device, and %d numbers",
                        signature.name, signature.num_tensors, signature.num_numbers);
  }
  void* stream = nullptr;
  if (arguments.device.device_type == kDLCUDA &&
      torch_objects().api->current_stream(kDLCUDA, arguments.device.device_id, &stream) != 0) {
    return nullptr;
  }
  Results results;
  try {
    if (run_native(self, self->on_cuda, arguments, objects, stream, results)) return wrap(signature, results);
    Shape shapes[most_outputs];
    PyObject* dtype;
    if (!PyErr_Occurred() && !describe(signature, arguments, shapes, &dtype)) {  // its own check says why
      self->on_cuda(arguments.tensors.data(), arguments.numbers.data(), nullptr, stream);
    }
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return PyErr_Occurred() ? nullptr : slow_way();
}

PyObject* entry_find(PyObject* object, PyObject* const* objects, Py_ssize_t count) {
  auto* self = reinterpret_cast<EntryObject*>(object);
  Arguments arguments;
  KeyWords words;
  if (count != num_arguments(self) || !read(*self->signature, objects, true, &arguments)) Py_RETURN_NONE;
  PyObject* plan = self->plans->find(key_of(*self->signature, arguments, &words));
  return Py_NewRef(plan ? plan : Py_None);
}

PyObject* entry_keep(PyObject* object, PyObject* const* objects, Py_ssize_t count) {
  auto* self = reinterpret_cast<EntryObject*>(object);
  Arguments arguments;
  KeyWords words;
  if (count != num_arguments(self) + 1 || !read(*self->signature, objects, true, &arguments)) Py_RETURN_FALSE;
  try {
    self->plans->keep(key_of(*self->signature, arguments, &words), objects[count - 1]);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  Py_RETURN_TRUE;
}

PyObject* entry_forget(PyObject* object, PyObject*) {
  reinterpret_cast<EntryObject*>(object)->plans->forget();
  Py_RETURN_NONE;
}

Py_ssize_t entry_length(PyObject* object) {
  return static_cast<Py_ssize_t>(reinterpret_cast<EntryObject*>(object)->plans->size());
}

PyObject* entry_new(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"name", "programs_on", "natives", nullptr};
  const char *name, *device = "cuda";
  unsigned long long natives = 0;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "s|sK", const_cast<char**>(names), &name, &device, &natives)) {
    return nullptr;
  }
  const Signature* signature = find_signature(name);
  if (!signature || (std::strcmp(device, "cuda") != 0 && std::strcmp(device, "cpu") != 0)) {
    return PyErr_Format(PyExc_ValueError, "no fast entry of operator %s with programs on %s", name, device);
  }
  auto* self = reinterpret_cast<EntryObject*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->vectorcall = entry_call;
  self->signature = signature;
  self->on_cpu = find_native(*signature, "cpu", native_operators);
  if (natives) {
    const auto list = reinterpret_cast<List>(natives);
    if (const NativeFunction on_cpu = find_native(*signature, "cpu", list)) self->on_cpu = on_cpu;
    self->on_cuda = find_native(*signature, "cuda", list);
  }
  self->programs_on = std::strcmp(device, "cuda") == 0 ? kDLCUDA : kDLCPU;
  self->plans = new (std::nothrow) Plans;
  if (!self->plans || !allocator().cpu) {
    Py_DECREF(self);
    return self->plans ? PyErr_Format(PyExc_RuntimeError, "this torch has no allocator to call") : PyErr_NoMemory();
  }
  return reinterpret_cast<PyObject*>(self);
}

void entry_free(PyObject* object) {
  auto* self = reinterpret_cast<EntryObject*>(object);
  PyTypeObject* type = Py_TYPE(object);
  delete self->plans;
  for (PyObject* allocation : self->allocations) Py_XDECREF(allocation);
  type->tp_free(object);
  Py_DECREF(type);
}

PyObject* entry_devices(PyObject* object, void*) {
  auto* self = reinterpret_cast<EntryObject*>(object);
  return Py_BuildValue("(NN)", PyBool_FromLong(self->on_cpu != nullptr), PyBool_FromLong(self->on_cuda != nullptr));
}

PyObject* entry_name(PyObject* object, void*) {
  return PyUnicode_FromString(reinterpret_cast<EntryObject*>(object)->signature->name);
}

PyMethodDef entry_methods[] = {
    {"cuda", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(entry_cuda)), METH_FASTCALL,
     "The CUDA library's function, past autograd; results as in the schema, NotImplemented where it does not serve."},
    {"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(entry_find)), METH_FASTCALL,
     "The plan kept for arguments like these, or None."},
    {"keep", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(entry_keep)), METH_FASTCALL,
     "Keeps a plan, the last argument, for arguments like these; returns whether it could."},
    {"forget", entry_forget, METH_NOARGS, "Forgets every plan."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef entry_attributes[] = {
    {"name", entry_name, nullptr, "The operator's.", nullptr},
    {"native", entry_devices, nullptr, "Whether there is a native function for the CPU, and for CUDA.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMemberDef entry_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(EntryObject, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};
PyType_Slot entry_slots[] = {
    {Py_tp_doc,
     const_cast<char*>("Entry(name, programs_on='cuda', natives=0): calls an operator without Python in between.\n\n"
                       "Answers NotImplemented where the call must go the slow way. natives: address of a "
                       "function like fastmeta_cuda_operators (csrc/native.h) that lists more.")},
    {Py_tp_new, reinterpret_cast<void*>(entry_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(entry_free)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, entry_methods},
    {Py_tp_getset, entry_attributes},
    {Py_tp_members, entry_members},
    {Py_sq_length, reinterpret_cast<void*>(entry_length)},
    {0, nullptr}};
PyType_Spec entry_spec{"fastmeta._C.Entry", sizeof(EntryObject), 0,
                       Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE, entry_slots};

}  // namespace

bool has_exchange_api() { return connected(); }

PyObject* entry_type() { return PyType_FromSpec(&entry_spec); }

}  // namespace fastmeta
