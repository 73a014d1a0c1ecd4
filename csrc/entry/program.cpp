#include "program.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "allocate.h"
#include "launch_step.h"
#include "product_step.h"
#include "signatures.h"

namespace fastmeta {

namespace {

// A Python error that is already set.
struct PythonError : std::exception {};

// Items of a tuple, read in order. Whatever does not fit is an error of whoever compiled the program, not of a user.
class Reader {
 public:
  explicit Reader(PyObject* tuple) : tuple_(tuple) {
    if (!PyTuple_Check(tuple)) throw std::invalid_argument("a program is made of tuples");
  }

  PyObject* object() {
    if (place_ >= PyTuple_GET_SIZE(tuple_)) throw std::invalid_argument("a tuple of the program is too short");
    return PyTuple_GET_ITEM(tuple_, place_++);
  }
  Reader tuple() { return Reader(object()); }
  bool more() const { return place_ < PyTuple_GET_SIZE(tuple_); }

  int64_t integer() { return checked<int64_t>(PyLong_AsLongLong(object())); }
  void* pointer() { return checked<void*>(PyLong_AsVoidPtr(object())); }
  double real() { return checked<double>(PyFloat_AsDouble(object())); }
  std::string text() {
    const char* found = PyUnicode_AsUTF8(object());
    if (!found) throw PythonError();
    return found;
  }

 private:
  template <class Value>
  static Value checked(Value value) {
    if (PyErr_Occurred()) throw PythonError();
    return value;
  }

  PyObject* tuple_;
  Py_ssize_t place_ = 0;
};

struct Limits {
  int inputs, outputs, numbers;
};

// ("input" | "output" | "scratch", index, bytes)
Address read_address(Reader reader, const Limits& limits) {
  const std::string base = reader.text();
  Address address;
  address.index = static_cast<int>(reader.integer());
  address.bytes = reader.integer();
  int most = 1;
  if (base == "input") {
    address.base = Address::Base::input;
    most = limits.inputs;
  } else if (base == "output") {
    address.base = Address::Base::output;
    most = limits.outputs;
  } else if (base == "scratch") {
    address.base = Address::Base::scratch;
  } else {
    throw std::invalid_argument("no memory is called " + base);
  }
  if (address.index < 0 || address.index >= most) throw std::invalid_argument("the program has no such " + base);
  return address;
}

// (index, factor); index -1: the factor itself
Number read_number(Reader reader, const Limits& limits) {
  Number number;
  number.index = static_cast<int>(reader.integer());
  number.factor = reader.real();
  if (number.index < -1 || number.index >= limits.numbers) throw std::invalid_argument("a call has no such number");
  return number;
}

// ("address", (...)) | ("number", (...)) | ("constant", eight bytes as an unsigned integer)
Parameter read_parameter(Reader reader, const Limits& limits) {
  Parameter parameter{};
  const std::string kind = reader.text();
  if (kind == "address") {
    parameter.kind = Parameter::Kind::address;
    parameter.address = read_address(reader.tuple(), limits);
  } else if (kind == "number") {
    parameter.kind = Parameter::Kind::number;
    parameter.number = read_number(reader.tuple(), limits);
  } else if (kind == "constant") {
    parameter.kind = Parameter::Kind::constant;
    parameter.constant = reinterpret_cast<uint64_t>(reader.pointer());
  } else {
    throw std::invalid_argument("no parameter is called " + kind);
  }
  return parameter;
}

// (function, (x, y, z), threads, shared bytes, (parameter, ...))
std::unique_ptr<Step> read_launch(Reader& reader, const Limits& limits) {
  void* function = reader.pointer();
  Reader sizes = reader.tuple();
  std::array<unsigned, 3> grid;
  for (unsigned& size : grid) size = static_cast<unsigned>(sizes.integer());
  const auto threads = static_cast<unsigned>(reader.integer());
  const auto shared_bytes = static_cast<unsigned>(reader.integer());
  std::vector<Parameter> parameters;
  for (Reader list = reader.tuple(); list.more();) parameters.push_back(read_parameter(list.tuple(), limits));
  if (parameters.size() > LaunchStep::most_parameters) throw std::invalid_argument("a kernel has too many parameters");
  return std::make_unique<LaunchStep>(function, grid, threads, shared_bytes, std::move(parameters));
}

// (address, dtype, (rows, columns), (row stride, column stride), alignment)
MatrixView read_matrix(Reader reader, const Limits& limits) {
  MatrixView matrix;
  matrix.at = read_address(reader.tuple(), limits);
  matrix.dtype = static_cast<lt::DataType>(reader.integer());
  Reader shape = reader.tuple(), strides = reader.tuple();
  matrix.rows = shape.integer();
  matrix.columns = shape.integer();
  matrix.row_stride = strides.integer();
  matrix.column_stride = strides.integer();
  matrix.alignment = static_cast<uint32_t>(reader.integer());
  return matrix;
}

// (out, a, b, addend | (), alpha, beta, bias | (), column sums | (), alignment of the last two, tf32, device)
std::unique_ptr<ProductStep> read_product(Reader& reader, const Limits& limits) {
  ProductArguments product{};
  const auto optional_address = [&] {
    const Reader address = reader.tuple();
    return address.more() ? read_address(address, limits) : Address{};
  };
  product.out = read_matrix(reader.tuple(), limits);
  product.a = read_matrix(reader.tuple(), limits);
  product.b = read_matrix(reader.tuple(), limits);
  const Reader addend = reader.tuple();
  if (addend.more()) product.addend = read_matrix(addend, limits);
  product.alpha = read_number(reader.tuple(), limits);
  product.beta = read_number(reader.tuple(), limits);
  product.bias = optional_address();
  product.column_sums = optional_address();
  product.vector_alignment = static_cast<uint32_t>(reader.integer());
  product.tf32 = reader.integer() != 0;
  product.device = static_cast<int>(reader.integer());
  return std::make_unique<ProductStep>(product);
}

// ((size, ...), torch dtype) as arguments of the allocator
PyObject* read_buffer(Reader reader) {
  std::vector<int64_t> sizes;
  for (Reader shape = reader.tuple(); shape.more();) sizes.push_back(shape.integer());
  PyObject* arguments = allocation(sizes.data(), static_cast<Py_ssize_t>(sizes.size()), reader.object());
  if (!arguments) throw PythonError();
  return arguments;
}

template <class Build>
bool translated(const Build& build) {
  try {
    build();
    return true;
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const NoSuchProduct& error) {
    PyErr_SetString(PyExc_LookupError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return false;
}

void program_free(PyObject* object) {
  auto* self = reinterpret_cast<ProgramObject*>(object);
  PyTypeObject* type = Py_TYPE(object);
  if (self->outputs) {
    for (PyObject* output : *self->outputs) Py_DECREF(output);
  }
  delete self->outputs;
  delete self->steps;
  Py_XDECREF(self->scratch);
  Py_XDECREF(self->before);
  Py_XDECREF(self->after);
  Py_XDECREF(self->observer);
  type->tp_free(object);
  Py_DECREF(type);
}

PyObject* program_new(PyTypeObject* type, PyObject* args, PyObject*) {
  int inputs = 0, numbers = 0;
  long long scratch_bytes = 0;
  int64_t workspace_bytes = 0;  // one after another, the products share it
  PyObject *outputs, *uint8, *steps, *before, *after, *observer;
  if (!PyArg_ParseTuple(args, "iiO(LO)O((O!O!)O)", &inputs, &numbers, &outputs, &scratch_bytes, &uint8, &steps,
                        &PyList_Type, &before, &PyList_Type, &after, &observer)) {
    return nullptr;
  }
  auto* self = reinterpret_cast<ProgramObject*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  const bool built = translated([&] {
    self->num_inputs = inputs;
    self->num_numbers = numbers;
    self->before = Py_NewRef(before);
    self->after = Py_NewRef(after);
    self->observer = Py_NewRef(observer);
    self->outputs = new std::vector<PyObject*>;
    self->steps = new std::vector<std::unique_ptr<Step>>;
    for (Reader list(outputs); list.more();) self->outputs->push_back(read_buffer(list.tuple()));
    if (inputs > most_tensors || numbers > most_numbers || self->outputs->size() > most_outputs) {
      throw std::invalid_argument("a program has more arguments or results than an operator");
    }
    const Limits limits{inputs, static_cast<int>(self->outputs->size()), numbers};
    for (Reader list(steps); list.more();) {
      Reader step = list.tuple();
      const std::string kind = step.text();
      if (kind == "launch") {
        self->steps->push_back(read_launch(step, limits));
      } else if (kind == "product") {
        auto product = read_product(step, limits);
        product->place_workspace(scratch_bytes);
        workspace_bytes = std::max(workspace_bytes, static_cast<int64_t>(product->workspace_bytes()));
        self->steps->push_back(std::move(product));
      } else {
        throw std::invalid_argument("no step is called " + kind);
      }
    }
    const int64_t all_bytes = scratch_bytes + workspace_bytes;
    if (all_bytes > 0 && !(self->scratch = allocation(&all_bytes, 1, uint8))) throw PythonError();
  });
  if (built) return reinterpret_cast<PyObject*>(self);
  Py_DECREF(self);
  return nullptr;
}

void* address_of(PyObject* tensor) {
  static PyObject* name = PyUnicode_InternFromString("data_ptr");
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, name);
  void* address = answer ? PyLong_AsVoidPtr(answer) : nullptr;
  Py_XDECREF(answer);
  return address;
}

// run(addresses, numbers, stream, device): for callers that do not come through an Entry.
PyObject* program_run(PyObject* object, PyObject* args) {
  const auto& self = *reinterpret_cast<ProgramObject*>(object);
  PyObject *addresses, *values;
  unsigned long long stream = 0;
  int device = -1;
  if (!PyArg_ParseTuple(args, "O!O!Ki", &PyTuple_Type, &addresses, &PyTuple_Type, &values, &stream, &device)) {
    return nullptr;
  }
  void* inputs[most_tensors]{};
  double numbers[most_numbers]{};
  const bool ready = translated([&] {
    Reader pointers(addresses), reals(values);
    for (int i = 0; i < self.num_inputs; ++i) inputs[i] = pointers.pointer();
    for (int i = 0; i < self.num_numbers; ++i) numbers[i] = reals.real();
  });
  PyObject* results[most_outputs]{};
  const auto count = static_cast<Py_ssize_t>(self.outputs->size());
  PyObject* tuple = nullptr;
  if (ready && run_program(self, device, inputs, numbers, reinterpret_cast<void*>(stream), results)) {
    tuple = PyTuple_New(count);
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tuple) {
      PyTuple_SET_ITEM(tuple, i, results[i]);
    } else {
      Py_XDECREF(results[i]);
    }
  }
  return tuple;
}

PyObject* program_allocations(PyObject* object, void*) {
  const auto& self = *reinterpret_cast<ProgramObject*>(object);
  PyObject* list = PyList_New(0);
  for (PyObject* output : *self.outputs) {
    if (list && PyList_Append(list, output) != 0) Py_CLEAR(list);
  }
  if (list && self.scratch && PyList_Append(list, self.scratch) != 0) Py_CLEAR(list);
  return list;
}

PyGetSetDef program_attributes[] = {{"allocations", program_allocations, nullptr,
                                     "(sizes, strides, dtype) of each result, and of the scratch memory.", nullptr},
                                    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMethodDef program_methods[] = {
    {"run", program_run, METH_VARARGS,
     "run(addresses, numbers, stream, device): the results; device is a GPU's number, or -1."},
    {nullptr, nullptr, 0, nullptr}};
PyType_Slot program_slots[] = {
    {Py_tp_doc, const_cast<char*>("Program(inputs, numbers, outputs, scratch, steps, ((before, after), observer)): "
                                  "launches of one layout, in C.")},
    {Py_tp_new, reinterpret_cast<void*>(program_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(program_free)},
    {Py_tp_methods, program_methods},
    {Py_tp_getset, program_attributes},
    {0, nullptr}};
PyType_Spec program_spec{"fastmeta._C.Program", sizeof(ProgramObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                         program_slots};

}  // namespace

PyTypeObject* program_type() {
  static PyObject* type = PyType_FromSpec(&program_spec);
  return reinterpret_cast<PyTypeObject*>(type);
}

namespace {

void observe(PyObject* observer, size_t step, void* stream, bool entering) {
  PyObject* answer = PyObject_CallFunction(observer, "nKO", static_cast<Py_ssize_t>(step),
                                           reinterpret_cast<unsigned long long>(stream), entering ? Py_True : Py_False);
  if (!answer) throw PythonError();
  Py_DECREF(answer);
}

void run_observed(const ProgramObject& program, const Call& call) {
  for (size_t i = 0; i < program.steps->size(); ++i) {
    observe(program.observer, i, call.stream, true);
    (*program.steps)[i]->run(call);
    observe(program.observer, i, call.stream, false);
  }
}

void run_steps(const ProgramObject& program, const Call& call) {
  PyThreadState* state = PyEval_SaveThread();  // a full queue makes a launch wait
  std::exception_ptr error;
  try {
    for (const auto& step : *program.steps) step->run(call);
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

}  // namespace

bool run_program(const ProgramObject& program, int device, void* const* inputs, const double* numbers, void* stream,
                 PyObject** results) {
  PyObject* allocate = device >= 0 ? allocator().cuda : allocator().cpu;
  void* outputs[most_outputs]{};
  for (size_t i = 0; i < program.outputs->size(); ++i) {
    results[i] = PyObject_Call(allocate, (*program.outputs)[i], nullptr);
    if (!results[i]) return false;
    outputs[i] = address_of(results[i]);
  }
  PyObject* scratch = program.scratch ? PyObject_Call(allocate, program.scratch, nullptr) : nullptr;
  if (program.scratch && !scratch) return false;
  const Call call{inputs, outputs, scratch ? static_cast<char*>(address_of(scratch)) : nullptr, numbers, stream};
  const bool observed = PyList_GET_SIZE(program.before) > 0 || PyList_GET_SIZE(program.after) > 0;
  const bool done = !PyErr_Occurred() && translated([&] {
    if (device >= 0) bind_context(device);
    observed ? run_observed(program, call) : run_steps(program, call);
  });
  // Torch's allocator gives the memory to later work of the same stream only, so it may go before the launches end.
  Py_XDECREF(scratch);
  return done;
}

}  // namespace fastmeta
