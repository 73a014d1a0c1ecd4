// A program in C: the launches and matrix products of one call, for arguments of one layout.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace fastmeta {

// A place in an input, in an output or in the scratch memory of a call.
struct Address {
  enum class Base : uint8_t { input, output, scratch, null } base = Base::null;
  int index = 0;
  int64_t bytes = 0;
};

// A number of the call times a constant, or the constant where index < 0.
struct Number {
  int index = -1;
  double factor = 0.0;
  double in(const double* numbers) const { return index < 0 ? factor : numbers[index] * factor; }
};

// The addresses, numbers and stream of one call.
struct Call {
  void* const* inputs;
  void* const* outputs;
  char* scratch;
  const double* numbers;
  void* stream;

  void* at(const Address& address) const {
    switch (address.base) {
      case Address::Base::input:
        return static_cast<char*>(inputs[address.index]) + address.bytes;
      case Address::Base::output:
        return static_cast<char*>(outputs[address.index]) + address.bytes;
      case Address::Base::scratch:
        return scratch + address.bytes;
      default:
        return nullptr;
    }
  }
};

class Step {
 public:
  virtual ~Step() = default;
  // Enqueues; throws std::runtime_error if the driver or the library refuses. Called without the GIL.
  virtual void run(const Call& call) const = 0;
};

struct ProgramObject {
  PyObject_HEAD;
  int num_inputs, num_numbers;
  std::vector<PyObject*>* outputs;  // arguments of the allocator
  PyObject* scratch;                // the same for one block of bytes, or null
  std::vector<std::unique_ptr<Step>>* steps;
  // Lists of a profiler's functions; while one is not empty, observer(step, stream, entering) is called around steps.
  PyObject *before, *after, *observer;
};

PyTypeObject* program_type();  // made at the first call; null with a Python error

// Allocates results and scratch memory on the current stream and enqueues every step. `results` gets new references.
// False with a Python error.
bool run_program(const ProgramObject& program, int device, void* const* inputs, const double* numbers, void* stream,
                 PyObject** results);

}  // namespace fastmeta
