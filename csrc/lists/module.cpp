// fastmeta._C_lists: lists of tensors from Python to the kernels, past torch's dispatcher and its conversions.
//
// A tensor in a list costs 300 ns as an argument of a registered operator and 140 ns through DLPack's exchange API with
// the questions that DLPack leaves open (negative bit, recorded derivative); torch's own C++ structs answer all of them
// in 10 ns. That ties this library, and no other of fastmeta, to the one torch it was built for: fastmeta/ops/_lists.py
// loads it only there, and lists go through the dispatcher elsewhere.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "list_tensor.h"

namespace py = pybind11;

namespace fastmeta {
namespace {

constexpr int64_t alignment = 64;  // of each result in its allocation

// The libraries with kernels: for the CPU, for CUDA, and CUDA's for the CPU, where tests run them.
struct Libraries {
  const ListFunctions *cpp = nullptr, *cuda = nullptr, *emulated = nullptr;
} libraries;

// `path` of a library that is loaded already.
void use(const std::string& name, const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "fastmeta_list_functions") : nullptr;
  if (!symbol) throw std::runtime_error(path + " has no functions of lists");
  auto& place = name == "cpp" ? libraries.cpp : name == "cuda" ? libraries.cuda : libraries.emulated;
  place = reinterpret_cast<decltype(&fastmeta_list_functions)>(symbol)();
}

// Those that serve a device, or serve it when named; nullptr: none.
const ListFunctions* functions(const std::optional<std::string>& impl, int32_t device) {
  if (device >= 0) return !impl || *impl == "cuda" ? libraries.cuda : nullptr;
  if (!impl || *impl == "cpp") return libraries.cpp;
  return *impl == "cuda" ? libraries.emulated : nullptr;
}

PyTypeObject *tensor_type, *parameter_type;

// What a plain tensor may have beside its memory: autograd and autocast, which look at calls of operators only. Any
// other bit (negative, zero, sparse, functorch, Python, ...) changes what the memory means.
bool is_plain(const c10::TensorImpl& tensor) {
  static const uint64_t allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU,
                           c10::DispatchKey::AutogradCUDA, c10::DispatchKey::ADInplaceOrView,
                           c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})
          .raw_repr();
  return (tensor.key_set().raw_repr() & ~allowed) == 0 && tensor.has_storage() && !tensor.has_symbolic_sizes_strides();
}

c10::TensorImpl* impl_of(py::handle object) { return THPVariable_Unpack(object.ptr()).unsafeGetTensorImpl(); }

ListTensor list_tensor(c10::TensorImpl& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return {static_cast<char*>(tensor.mutable_data()),
          sizes.data(),
          strides.data(),
          tensor.dim(),
          tensor.numel(),
          c10::typeMetaToScalarType(tensor.dtype()),
          static_cast<int32_t>(tensor.itemsize()),
          tensor.device().is_cpu() ? -1 : tensor.device().index(),
          tensor.is_contiguous()};
}

// nullptr: not a plain tensor, or one whose derivative is being recorded.
c10::TensorImpl* plain(py::handle object, bool grad) {
  if (Py_TYPE(object.ptr()) != tensor_type && Py_TYPE(object.ptr()) != parameter_type) return nullptr;
  c10::TensorImpl* tensor = impl_of(object);
  return is_plain(*tensor) && !(grad && tensor->requires_grad()) ? tensor : nullptr;
}

// One list as column k of [count, K]; false: not all are plain, or not `count`.
bool read(const py::list& list, std::vector<ListTensor>& tensors, size_t k, size_t K) {
  const bool grad = c10::GradMode::is_enabled();
  if (list.size() * K != tensors.size()) return false;
  for (size_t i = 0; i < list.size(); ++i) {
    c10::TensorImpl* tensor = plain(PyList_GET_ITEM(list.ptr(), i), grad);
    if (!tensor) return false;
    tensors[i * K + k] = list_tensor(*tensor);
  }
  return true;
}

// Tensors like these; where all of them are contiguous, one allocation cut into pieces, which costs a fifth.
std::vector<at::Tensor> empty_like(const std::vector<ListTensor>& tensors, const py::list& like, size_t K) {
  std::vector<at::Tensor> made;
  made.reserve(like.size());
  int64_t bytes = 0;
  bool contiguous = true;
  for (size_t i = 0; i < tensors.size(); i += K) {
    bytes += (tensors[i].numel * tensors[i].element_size + alignment - 1) / alignment * alignment;
    contiguous = contiguous && tensors[i].contiguous;
  }
  if (!contiguous) {
    for (py::handle one : like) made.push_back(at::empty_like(THPVariable_Unpack(one.ptr())));
    return made;
  }
  const c10::Device device = impl_of(like[0])->device();
  const at::Tensor memory = at::empty({bytes}, at::TensorOptions().device(device).dtype(at::kByte));
  const auto key = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  int64_t begin = 0;
  for (size_t i = 0; i < tensors.size(); i += K) {
    const ListTensor& one = tensors[i];
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory.storage()), c10::DispatchKeySet(key),
                                                           c10::scalarTypeToTypeMeta(one.type));
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous({one.sizes, static_cast<size_t>(one.dim)});
    tensor.unsafeGetTensorImpl()->set_storage_offset(begin / one.element_size);
    begin += (one.numel * one.element_size + alignment - 1) / alignment * alignment;
    made.push_back(std::move(tensor));
  }
  return made;
}

c10::TensorImpl& any_tensor(py::handle object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("a tensor is expected");
  return *impl_of(object);
}

// As torch.autograd.graph.increment_version.
void written(const py::list& tensors) {
  for (py::handle one : tensors) any_tensor(one).bump_version();
}

// -1: an inference tensor, which has none.
py::list versions(const py::list& tensors) {
  py::list found(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    c10::TensorImpl& tensor = any_tensor(PyList_GET_ITEM(tensors.ptr(), i));
    const int64_t version = tensor.is_inference() ? -1 : int64_t{tensor.version_counter().current_version()};
    PyList_SET_ITEM(found.ptr(), i, PyLong_FromLongLong(version));
  }
  return found;
}

std::optional<double> number(py::handle object) {
  if (!PyFloat_Check(object.ptr()) && !PyLong_CheckExact(object.ptr())) return std::nullopt;
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The directions; None: go through the dispatcher, which words errors too. Nothing was written then.
py::object align_lists(const std::optional<std::string>& impl, const py::list& grads_labeled,
                       const py::list& grads_unlabeled, const py::list& ema_labeled, const py::list& ema_fourth,
                       const std::optional<py::list>& out, py::handle decay, py::handle decay_norm,
                       py::handle epsilon) {
  constexpr size_t K = 5;
  const size_t count = grads_labeled.size();
  const auto d = number(decay), d_norm = number(decay_norm), eps = number(epsilon);
  if (count == 0 || !d || !d_norm || !eps) return py::none();
  std::vector<ListTensor> tensors(K * count);
  const bool all = read(grads_labeled, tensors, 0, K) && read(grads_unlabeled, tensors, 1, K) &&
                   read(ema_labeled, tensors, 2, K) && read(ema_fourth, tensors, 3, K) &&
                   (!out || read(*out, tensors, 4, K));
  const ListFunctions* use = all ? functions(impl, tensors[0].device) : nullptr;
  if (!use) return py::none();
  std::vector<at::Tensor> made;
  if (!out) {
    made = empty_like(tensors, grads_labeled, K);
    for (size_t i = 0; i < count; ++i) tensors[K * i + 4] = list_tensor(*made[i].unsafeGetTensorImpl());
  }
  const AlignmentNumbers numbers = {*d, *d_norm, *eps};
  try {
    use->check_alignment(tensors.data(), count, numbers);
  } catch (const std::exception&) {
    return py::none();
  }
  {
    py::gil_scoped_release released;
    use->align(tensors.data(), count, numbers);
  }
  written(ema_labeled);
  written(ema_fourth);
  if (out) {
    written(*out);
    return *out;
  }
  py::list directions(count);
  for (size_t i = 0; i < count; ++i) PyList_SET_ITEM(directions.ptr(), i, THPVariable_Wrap(std::move(made[i])));
  return directions;
}

std::optional<int64_t> backup_bytes(const py::list& params) {
  std::vector<ListTensor> tensors(params.size());
  if (params.empty() || !read(params, tensors, 0, 1)) return std::nullopt;
  int64_t bytes = backup_align;
  for (const ListTensor& theta : tensors) bytes += bytes_of_copy(theta);
  return bytes;
}

// Keeps what the kernels write into.
struct Block {
  std::unique_ptr<Perturbation> kernels;
  py::list lists[2];                 // parameters, directions
  std::vector<const void*> data[2];  // where they were on entry
  at::Tensor backup, epsilon;
  c10::Storage epsilon_memory;  // whatever is made of the tensor, which the user sees

  // Of the parameters (0) or directions (1): places of those whose memory has been replaced since.
  py::list replaced(int list) const {
    py::list places;
    for (size_t i = 0; i < data[list].size(); ++i) {
      c10::TensorImpl* tensor = impl_of(PyList_GET_ITEM(lists[list].ptr(), i));
      if (!tensor->has_storage() || tensor->mutable_data() != data[list][i]) places.append(i);
    }
    return places;
  }
};

std::unique_ptr<Block> perturb_lists(const std::optional<std::string>& impl, const py::list& params,
                                     const py::list& direction, py::handle backup) {
  constexpr size_t K = 2;
  std::vector<ListTensor> tensors(K * params.size());
  c10::TensorImpl* memory = plain(backup, false);
  if (params.empty() || !memory || !read(params, tensors, 0, K) || !read(direction, tensors, 1, K)) return nullptr;
  const ListFunctions* use = functions(impl, tensors[0].device);
  if (!use) return nullptr;
  auto type = at::kFloat;
  for (const ListTensor& one : tensors) type = one.type == at::kDouble ? at::kDouble : type;
  auto block = std::make_unique<Block>();
  block->lists[0] = params;
  block->lists[1] = direction;
  for (size_t i = 0; i < tensors.size(); ++i) block->data[i % K].push_back(tensors[i].data);
  block->backup = THPVariable_Unpack(backup.ptr());
  block->epsilon = at::empty({}, at::TensorOptions().device(memory->device()).dtype(type));
  block->epsilon_memory = block->epsilon.storage();
  try {
    block->kernels.reset(use->perturb(tensors.data(), params.size(), list_tensor(*memory),
                                      list_tensor(*block->epsilon.unsafeGetTensorImpl())));
  } catch (const std::exception&) {
    return nullptr;
  }
  return block;
}

}  // namespace
}  // namespace fastmeta

PYBIND11_MODULE(_C_lists, m) {
  using namespace fastmeta;
  m.doc() = "The operators on lists of tensors, past torch's dispatcher; for the torch it was built for.";
  m.attr("BUILT_FOR_TORCH") = FASTMETA_BUILT_FOR_TORCH;
  const auto type = [](const char* module, const char* name) {  // never released, as types are not
    return reinterpret_cast<PyTypeObject*>(py::module_::import(module).attr(name).cast<py::object>().release().ptr());
  };
  tensor_type = type("torch", "Tensor");
  parameter_type = type("torch.nn", "Parameter");
  m.def("use", &use, "The kernels of a library that is loaded.");
  m.def("written", &written, "Tell autograd that these tensors were written.");
  m.def("versions", &versions, "Of the tensors for autograd; -1 where there is none.");
  m.def("align", &align_lists, "alignment_direction, or None where the call is the dispatcher's.");
  m.def("backup_bytes", &backup_bytes, "Of a backup of these parameters, or None where they are not plain tensors.");
  m.def("perturb", &perturb_lists,
        "The kernels of one block of perturbed, or None where the calls are the dispatcher's.");
  py::class_<Block>(m, "Block")
      .def("enter",
           [](Block& block, double radius) {
             py::gil_scoped_release released;
             block.kernels->enter(radius);
           })
      .def("replaced", &Block::replaced)
      .def("epsilon", [](Block& block) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(block.epsilon)); })
      .def("move",
           [](Block& block, double sign) {
             py::gil_scoped_release released;
             block.kernels->move(sign);
           })
      .def("restore",
           [](Block& block) {
             py::gil_scoped_release released;
             block.kernels->restore();
           })
      .def("leave_out", [](Block& block, const std::vector<size_t>& places) {
        std::vector<const char*> left;
        for (const size_t place : places) left.push_back(static_cast<const char*>(block.data[0].at(place)));
        std::sort(left.begin(), left.end());
        block.kernels->leave_out(left.data(), left.data() + left.size());
      });
}
